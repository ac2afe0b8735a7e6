"""Entry point of a rank that the launcher starts: `python -m shoestring.launch.start_rank RUN_DIR/config.yaml`."""

from __future__ import annotations

import sys
from pathlib import Path

from .orphan import die_with_launcher
from .say import open_standard_streams


def main() -> None:
    """Be the rank that torchrun's variables name, of the run that the launcher has written down."""
    die_with_launcher()  # before the imports below, which take seconds
    open_standard_streams()
    from .worker import run_from_file

    sys.exit(run_from_file(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
