"""Asking the ranks of a run to stop after their step, with a checkpoint.

SIGTERM and SIGUSR1 do so, whether the launcher gets them or a rank; SIGTERM also by way of torchrun, which passes it on
and kills what has not ended 30 seconds later. The launcher therefore tells its ranks by a file. SIGINT stops at once.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType

STOP_FILE_VARIABLE = "SHOESTRING_STOP_FILE"
"""Names a file on this machine that says by being there that the ranks shall stop."""

ASKING_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def listen_for_stop() -> Callable[[], bool]:
    """In a rank: from now on the signals only ask. Returns what says whether one has come, or the launcher asks."""
    path = os.environ.get(STOP_FILE_VARIABLE)
    heard: list[int] = []

    def hear(number: int, frame: FrameType | None) -> None:
        heard.append(number)

    for number in ASKING_SIGNALS:
        signal.signal(number, hear)
        signal.siginterrupt(number, False)  # a communication that is under way goes on
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # at once, and without a traceback from each rank
    return lambda: bool(heard) or (path is not None and Path(path).exists())
