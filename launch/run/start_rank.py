"""Entry point of a rank that the launcher starts: `python -m shoestring.launch.run.start_rank RUN_DIR/config.yaml`."""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from ..console import open_standard_streams
from .signals import die_with_launcher


def main() -> None:
    """Be the rank that torchrun's variables name, of the run that the launcher has written down."""
    die_with_launcher()  # before the imports below, which take seconds
    open_standard_streams()
    from .worker import run_rank_from_config_file

    exit_without_teardown(run_rank_from_config_file(Path(sys.argv[1])))


def exit_without_teardown(code: int) -> NoReturn:
    """End this process with `code`, and without Python's own end.

    That unloads modules while threads of torch may still be running. One of them that wants the interpreter then aborts
    the process: about one rank in ten that was stopped before its first step ended with SIGABRT in place of its code.
    """
    atexit._run_exitfuncs()  # temporary folders of wandb
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
