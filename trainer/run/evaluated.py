"""Up to which step a run has been evaluated: a checkpoint is saved before the evaluation that is due with it.

So it says that the evaluation is owed, and a run that goes on from it must know whether it has come after all.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from ...comm.files.access import read_text
from ...comm.files.strict_json import Malformed

_FILE = "evaluated"


def note_evaluated(run_dir: Path, step: int) -> None:
    """Note that the evaluation after `step` steps is told. Where this cannot be written, it will come once more."""
    new = run_dir / f"{_FILE}.new"
    with suppress(OSError):
        new.write_text(f"{step}\n")
        new.replace(run_dir / _FILE)


def forget_evaluations(run_dir: Path) -> None:
    """Forget what was noted: a run begins from step 0."""
    with suppress(OSError):
        (run_dir / _FILE).unlink(missing_ok=True)


def evaluated_until(run_dir: Path) -> int:
    """Return the last step that was noted; 0 where there is none, or none that can be read."""
    try:
        text = read_text(run_dir / _FILE, 1000).strip()
    except (OSError, Malformed):
        return 0
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0
