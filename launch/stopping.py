"""Asking the ranks of a run to stop after their step, with a checkpoint.

SIGTERM, SIGUSR1, SIGHUP and SIGQUIT do so, whether the launcher gets them, a rank, or what starts the ranks: each of
these tells all ranks of the machine by a file. SIGINT stops at once.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType

STOP_FILE_VARIABLE = "SHOESTRING_STOP_FILE"
"""Names a file on this machine that says by being there that the ranks shall stop."""

ASKING_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGQUIT)
"""Those that end a run when they come again. SIGHUP may come twice for one closed terminal."""


def listened_to(numbers: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Return those of `numbers` that this process listens to: under nohup, SIGHUP means nothing."""
    return [each for each in numbers if each != signal.SIGHUP or signal.getsignal(each) is not signal.SIG_IGN]


def listen_for_stop() -> Callable[[], bool]:
    """In a rank: from now on the signals only ask. Returns what says whether one has come, or the launcher asks."""
    path = os.environ.get(STOP_FILE_VARIABLE)
    heard: list[int] = []

    def hear(number: int, frame: FrameType | None) -> None:
        heard.append(number)

    for number in listened_to(ASKING_SIGNALS):
        signal.signal(number, hear)
        signal.siginterrupt(number, False)  # a communication that is under way goes on
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING_SIGNALS)  # what came while this process started comes now
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # at once, and without a traceback from each rank
    return lambda: bool(heard) or (path is not None and Path(path).exists())
