"""Prints the parity table, then the table of deliberate breaks. Ends with 1 when anything is not as it must be.

python -m shoestring.tests.parity            every row
python -m shoestring.tests.parity ep4 fp64   rows whose name holds every word
"""

from __future__ import annotations

import sys
import time

from shoestring.tests.parity.breaks import BREAKS
from shoestring.tests.parity.layouts import LAYOUTS, STEPS
from shoestring.tests.parity.runner import run_layout


def main(words: list[str]) -> int:
    began, failed = time.monotonic(), 0
    for layout in LAYOUTS:
        if not set(words) <= set(layout.name.split()):
            continue
        errors = run_layout(layout, STEPS)
        wrong = errors.over(layout.tolerance)
        failed += bool(wrong)
        print(f"{layout.name}  {errors.line()}", f"  WRONG: {', '.join(sorted(wrong))}" if wrong else "", flush=True)
    for name, case in BREAKS.items():
        if words:
            break
        errors = run_layout(case.layout, 1, name)
        wrong = errors.over(case.layout.tolerance)
        failed += wrong != case.wrong
        print(f"break: {name:32} seen in {', '.join(sorted(wrong)) or 'nothing'}", flush=True)
    print(f"{failed} not as expected, {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
