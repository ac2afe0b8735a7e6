"""The `shoestring` command: one verb a purpose."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext

from .. import __version__
from ..comm.errors import ConfigError
from ..comm.files.file_io import os_error_to_problem
from .console import open_standard_streams, print_to_stderr
from .parsers import checkpoints, data, machine, model, planning, runs, training
from .run.signals import StoppedBeforeStart, die_with_launcher, raise_on_early_stop
from .run.torchrun import RanksFailed

EXIT_FAILURE, EXIT_CONFIG_ERROR, EXIT_PREEMPTED, EXIT_INTERRUPTED = 1, 2, 75, 128 + signal.SIGINT

# In the order of `shoestring -h`.
_FAMILIES = (
    training.add_commands,
    model.add_commands,
    planning.add_commands,
    machine.add_commands,
    runs.add_commands,
    checkpoints.add_commands,
    data.add_commands,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: run the verb and exit with its code; 2 for refused input, every problem on a line of its own.

    Ctrl-C ends a verb with 130; a request to stop `train` before it began, with 75, as one that was served.
    """
    die_with_launcher()
    open_standard_streams()
    options = parse_arguments(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        with raise_on_early_stop() if options.verb == "train" else nullcontext():
            code = run(options)
    except StoppedBeforeStart as stopped:
        print_to_stderr(f"shoestring train: stopped by {stopped}")
        code = EXIT_PREEMPTED
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would cut the end short, with a traceback
        print_to_stderr(f"shoestring {options.verb}: stopped by SIGINT")
        code = EXIT_INTERRUPTED
    except ConfigError as refused:
        print_to_stderr(f"shoestring {options.verb}: refused")
        for problem in refused.problems:
            print_to_stderr(f"  {problem}")
        code = EXIT_CONFIG_ERROR
    except BrokenPipeError:
        raise  # who reads the output has gone: no file is at fault
    except OSError as error:
        problem = os_error_to_problem(error, "a file that the system does not name", "nothing more was done")
        print_to_stderr(f"shoestring {options.verb}: refused\n  {problem}")
        code = EXIT_CONFIG_ERROR
    except RanksFailed as failed:
        print_to_stderr(f"shoestring {options.verb}: {failed}")
        code = EXIT_FAILURE
    sys.exit(code)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What was asked for; overrides may stand before, between and behind options.

    argparse fills a list of positionals once, with those before the next option, and has no intermixed parsing for
    verbs: what it leaves over are overrides too.
    """
    parser = _parser()
    options, left = parser.parse_known_args(arguments)
    left = [text for text in left if text != "--"]
    if left and ("overrides" not in options or any(text.startswith("-") for text in left)):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        options.overrides = [*options.overrides, *left]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shoestring", description="Pretrain a mixture-of-experts model inside a GPU-hour budget."
    )
    parser.add_argument("--version", action="version", version=f"shoestring {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for add_commands in _FAMILIES:
        add_commands(verbs)
    return parser


if __name__ == "__main__":
    main()
