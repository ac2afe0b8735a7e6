"""Prints the parity table, then the table of deliberate breaks. Ends with 1 when anything is not as it must be.

python -m shoestring.tests.parity            everything
python -m shoestring.tests.parity ep4 fp64   rows whose name holds each of these words
"""

import sys
import time

from shoestring.tests.parity.breaks import BREAKS
from shoestring.tests.parity.layouts import QUICK, SLOW, STEPS, Layout
from shoestring.tests.parity.runner import run_layout


def print_layout(layout: Layout) -> bool:
    """Run one row and print its line; return whether it is right."""
    errors = run_layout(layout, STEPS)
    wrong = errors.over(layout.tolerance)
    note = f"  WRONG: {', '.join(sorted(wrong))}" if wrong else ""
    print(f"{layout.name}  {errors.line()}{note}", flush=True)
    return not wrong


def print_break(name: str) -> bool:
    """Run one break and print where it was seen; return whether that is the expected place."""
    case = BREAKS[name]
    wrong = run_layout(case.layout, 1, name).over(case.layout.tolerance)
    note = "" if wrong == case.wrong else f"  EXPECTED {', '.join(sorted(case.wrong))}"
    print(f"broken: {name:31} seen in {', '.join(sorted(wrong)) or 'nothing'}{note}", flush=True)
    return wrong == case.wrong


def main(words: list[str]) -> int:
    """Run the rows and breaks whose names hold `words`; return the exit code."""
    began = time.monotonic()
    right = [print_layout(layout) for layout in (*QUICK, *SLOW) if set(words) <= set(layout.name.split())]
    right += [print_break(name) for name in BREAKS if not words]
    print(f"{sum(right)} of {len(right)} as they must be, {time.monotonic() - began:.0f} s")
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
