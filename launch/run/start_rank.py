"""Entry point of every rank: `python -m shoestring.launch.run.start_rank MODULE:FUNCTION PATH`.

The function takes the path and returns the exit code: `worker:run_rank_from_config_file` with RUN_DIR/config.yaml, or
`on_ranks:run_call` with the folder of the call.
"""

import atexit
import os
import pkgutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from ..console import open_standard_streams
from .signals import die_with_launcher


def main() -> None:
    """Run the rank that torchrun's variables name, and exit with its code."""
    die_with_launcher()  # before the function's module is imported, which takes seconds
    open_standard_streams()
    exit_without_teardown(pkgutil.resolve_name(sys.argv[1])(Path(sys.argv[2])))


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
