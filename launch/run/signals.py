"""Signals of a run: requests to stop, and ranks that end with their launcher.

SIGTERM, SIGUSR1, SIGHUP and SIGQUIT ask the ranks to stop after their step, with a checkpoint, whether the launcher
gets them, a rank, or what starts the ranks: each of these tells all ranks of the machine by a file. SIGINT stops at
once. A killed launcher leaves no ranks behind (Linux only).

Nothing is imported here that takes time: a rank calls this before it loads torch, and is unprotected until then.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from ..console import print_to_stderr

STOP_FILE_ENV_VAR = "SHOESTRING_STOP_FILE"
"""Names a file on this machine that says by being there that the ranks shall stop."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)
FORCE_STOP_SIGNALS = (signal.SIGTERM, signal.SIGQUIT)
"""Those that end a run when they come again. SIGHUP may come twice for one closed terminal."""
STOP_DEBOUNCE_SECONDS = 2
"""Slurm may signal a process twice, by itself and in its group."""
_SECONDS_OF_A_WAIT = 3600.0
"""`select` takes no number of seconds that is too large."""


class StoppedBeforeStart(BaseException):
    """A request to stop came before this process listened for it: nothing was trained."""


@contextmanager
def raise_on_early_stop() -> Iterator[None]:
    """Until `install_stop_handlers` or the launcher hears them, the signals raise `StoppedBeforeStart`: imports take seconds.

    Once one has, this process is about to end, and further ones are ignored.
    """
    former = {number: signal.signal(number, _stop_early) for number in exclude_ignored_signals(STOP_SIGNALS)}
    try:
        yield
    finally:
        for number, handler in former.items():
            if signal.getsignal(number) is _stop_early:
                signal.signal(number, handler)


def ignore_late_stop_signals() -> None:
    """The ranks have ended: signals that still mean `StoppedBeforeStart` would lie, and may not cut the closing short."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is _stop_early:
            signal.signal(number, signal.SIG_IGN)


def _stop_early(number: int, frame: FrameType | None) -> NoReturn:
    ignore_late_stop_signals()
    raise StoppedBeforeStart(f"{signal.Signals(number).name} before it began; nothing was trained")


def exclude_ignored_signals(numbers: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Return those of `numbers` that this process listens to: under nohup, SIGHUP means nothing."""
    return [each for each in numbers if each != signal.SIGHUP or signal.getsignal(each) is not signal.SIG_IGN]


def install_stop_handlers(stop_seconds: float) -> Callable[[], bool]:
    """In a rank: from now on the signals only ask. Returns what says whether one has come, or the launcher asks.

    Without a launcher the rank itself ends at a second of `FORCE_STOP_SIGNALS`, and `stop_seconds` after the first signal.
    """
    path = os.environ.get(STOP_FILE_ENV_VAR)
    heard: list[int] = []

    def hear(number: int, frame: FrameType | None) -> None:
        heard.append(number)

    if path is None:
        _end_if_told_again(stop_seconds)
    for number in exclude_ignored_signals(STOP_SIGNALS):
        signal.signal(number, hear)
        signal.siginterrupt(number, False)  # a communication that is under way goes on
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # what came while this process started comes now
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # at once, and without a traceback from each rank
    return lambda: bool(heard) or (path is not None and Path(path).exists())


def _end_if_told_again(stop_seconds: float) -> None:
    """In a thread, which also hears a signal while the main one waits for messages outside Python."""
    ear, mouth = os.pipe()
    os.set_blocking(mouth, False)
    signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
    threading.Thread(target=_end_in_time, args=(ear, stop_seconds), daemon=True, name="second stop").start()


def _end_in_time(ear: int, stop_seconds: float) -> None:
    """Read the numbers of signals from `ear`; end this process as `install_stop_handlers` says."""
    first = next(number for number in iter(lambda: os.read(ear, 1)[0], None) if number in STOP_SIGNALS)
    asked_at = time.monotonic()
    while (left := asked_at + stop_seconds - time.monotonic()) > 0:
        if not select.select([ear], [], [], min(left, _SECONDS_OF_A_WAIT))[0]:
            continue
        number = os.read(ear, 1)[0]
        if number in FORCE_STOP_SIGNALS and time.monotonic() - asked_at > STOP_DEBOUNCE_SECONDS:
            _end(number, f"a second request, {signal.Signals(number).name}")
    _end(first, f"no end within {stop_seconds:g} s (training.stop_seconds) of {signal.Signals(first).name}")


def _end(number: int, words: str) -> NoReturn:
    print_to_stderr(f"shoestring train: ended at once: {words}; the same command goes on from the last checkpoint")
    os._exit(128 + number)


LAUNCHER_PID_ENV_VAR = "SHOESTRING_LAUNCHER_PID"

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: between fork and exec is no place for it


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def die_with_launcher() -> None:
    """In a rank: die with torchrun, which dies with the launcher; at once if the launcher has died already."""
    launcher = os.environ.get(LAUNCHER_PID_ENV_VAR)
    if launcher is None or "RANK" not in os.environ:
        return
    die_with_parent()
    if _is_dead(int(launcher)) or os.getppid() in (1, int(launcher)):  # torchrun died before the line above
        sys.exit(1)


def _is_dead(pid: int) -> bool:
    """Also before its parent has asked for it: a zombie still has a number."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return True
    except OSError:  # no /proc
        return False
    return state in "ZX"
