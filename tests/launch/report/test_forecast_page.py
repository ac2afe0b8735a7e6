"""The page of a plan's best layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoestring.tests.launch.command_line import answer, tree_of
from shoestring.tests.launch.small_plan import SMALL_PLAN

V3 = "experiment=deepseek_v3_h800"


def test_a_page_of_the_best_layout(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    best = tree_of(capsys, *SMALL_PLAN, "--html", str(page))["layouts"][0]
    text = page.read_text()
    assert f"{best['step_seconds']:.3f} s" in text
    assert "<svg" in text
    said = answer(capsys, *SMALL_PLAN, "--html", str(tmp_path), code=2)
    assert "--html" in said
