"""Every layout does what one process does, and every broken convention is seen.

`python -m shoestring.tests.parity` prints the same tables.
"""

from __future__ import annotations

import pytest

from shoestring.tests.parity.breaks import BREAKS
from shoestring.tests.parity.layouts import LAYOUTS, STEPS, Layout
from shoestring.tests.parity.runner import run_layout

# A break must stand this far above the tolerance: what is barely seen in a test is not seen in a run.
MARGIN = 1e4


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, id="-".join(layout.name.split()), marks=[pytest.mark.slow] if layout.slow else [])
        for layout in LAYOUTS
    ],
)
def test_a_layout_is_its_twin(layout: Layout) -> None:
    errors = run_layout(layout, STEPS)
    print(f"{layout.name}  {errors.line()}")
    assert not errors.over(layout.tolerance), errors


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_convention_is_seen_where_it_must_be_and_nowhere_else(name: str) -> None:
    case = BREAKS[name]
    errors = run_layout(case.layout, 1, name)
    assert errors.over(case.layout.tolerance) == case.wrong, errors
    assert errors.over(MARGIN * case.layout.tolerance) == case.wrong, errors
