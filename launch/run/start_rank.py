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
    """Run the rank that torchrun's variables name, with the configuration that the launcher wrote."""
    die_with_launcher()  # before the imports below, which take seconds
    open_standard_streams()
    from .worker import run_rank_from_config_file

    exit_without_teardown(run_rank_from_config_file(Path(sys.argv[1])))


def exit_without_teardown(code: int) -> NoReturn:
    """End this process with `code`, without Python's finalization."""
    # Finalization unloads modules while threads of torch may still run. A thread that then takes the interpreter lock
    # aborts the process: about one in ten ranks stopped before their first step ended with SIGABRT instead of `code`.
    atexit._run_exitfuncs()  # temporary folders of wandb
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
