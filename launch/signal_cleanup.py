"""Signals during a verb that writes files: it removes its unfinished output and exits with 128 + n."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from .console import print_to_stderr
from .run.launcher import StoppedBySignal
from .run.signals import STOP_SIGNALS, exclude_ignored_signals, handle_signals


@contextmanager
def clean_up_on_signal(verb: str, outcome: str = "unfinished output was removed") -> Iterator[None]:
    """Raise inside the block at a signal, so that its clean-up runs; then print a message and exit with 128 + n.

    SIGINT raises `KeyboardInterrupt`, also out of the block. Further signals are ignored until the block has ended, so
    that none interrupts the clean-up. Call it in the main thread.
    """
    stopped_by: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if not stopped_by:
            stopped_by.append(number)
            raise KeyboardInterrupt if number == signal.SIGINT else StoppedBySignal(number)

    with handle_signals((*exclude_ignored_signals(STOP_SIGNALS), signal.SIGINT), stop):
        try:
            yield
        except StoppedBySignal as stopped:
            print_to_stderr(f"shoestring {verb}: {stopped}; {outcome}")
            raise SystemExit(stopped.exit_code) from None
