"""Stop signals of a run, and the death of ranks with their launcher.

SIGTERM, SIGUSR1, SIGHUP and SIGQUIT request a stop after the current step, with a checkpoint, whether the launcher,
torchrun or a rank receives them: each passes the request to all ranks of the machine by a file. SIGINT stops
immediately. A killed launcher leaves no ranks behind (Linux only).

This module imports nothing slow: a rank uses it before it loads torch, and is unprotected until then.
"""

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

from ..console import RESUME_HINT, print_to_stderr

STOP_FILE_ENV_VAR = "SHOESTRING_STOP_FILE"
"""Environment variable with the path of the stop file; the ranks stop once the file exists."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)
FORCE_STOP_SIGNALS = (signal.SIGTERM, signal.SIGQUIT)
"""Signals that force a stop when they come a second time. SIGHUP does not: one closed terminal may send it twice."""
STOP_DEBOUNCE_SECONDS = 2
"""Repeats within this time count as one signal: Slurm may signal a process twice, alone and in its group."""
_MAX_SELECT_SECONDS = 3600.0
"""Limit for one `select`, which rejects very large timeouts."""


class StoppedBeforeStart(BaseException):
    """A stop signal came before all nodes or ranks had connected; nothing was trained."""


@contextmanager
def handle_signals(
    numbers: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """Handle `numbers` by `handler` inside the block, and then as before, unless the block has replaced `handler`."""
    former = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in former.items():
            if signal.getsignal(number) is handler:
                signal.signal(number, before)


@contextmanager
def raise_on_early_stop() -> Iterator[None]:
    """Raise `StoppedBeforeStart` at a stop signal until `install_stop_handlers` or the launcher handles them.

    It covers the imports, which take seconds. Further signals are ignored, as the process is about to end.
    """
    with handle_signals(exclude_ignored_signals(STOP_SIGNALS), _stop_early):
        yield


def ignore_late_stop_signals() -> None:
    """Ignore the signals that still raise `StoppedBeforeStart`, which is no longer true after the ranks have ended."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is _stop_early:
            signal.signal(number, signal.SIG_IGN)


def _stop_early(number: int, frame: FrameType | None) -> NoReturn:
    ignore_late_stop_signals()
    raise StoppedBeforeStart(f"stopped by {signal.Signals(number).name} before it began; nothing was trained")


def exclude_ignored_signals(numbers: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Return `numbers` without SIGHUP if this process ignores it, as under nohup."""
    return [each for each in numbers if each != signal.SIGHUP or signal.getsignal(each) is not signal.SIG_IGN]


def install_stop_handlers(stop_seconds: float) -> Callable[[], bool]:
    """Install a rank's handlers; return a function that tells whether a stop was requested by signal or stop file.

    Without a launcher, the rank ends at a second signal of `FORCE_STOP_SIGNALS` or `stop_seconds` after the first.
    """
    path = os.environ.get(STOP_FILE_ENV_VAR)
    received: list[int] = []

    def record(number: int, frame: FrameType | None) -> None:
        received.append(number)

    if path is None:
        _start_force_stop_thread(stop_seconds)
    for number in exclude_ignored_signals(STOP_SIGNALS):
        signal.signal(number, record)
        signal.siginterrupt(number, False)  # a system call of a communication in progress is restarted
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # signals that came during startup are delivered now
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the default ends the rank without a traceback
    return lambda: bool(received) or (path is not None and Path(path).exists())


def _start_force_stop_thread(stop_seconds: float) -> None:
    # A thread with a wake-up pipe, since Python runs no handler while the main thread waits for messages in C++.
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    threading.Thread(target=_force_stop, args=(read_end, stop_seconds), daemon=True, name="second stop").start()


def _force_stop(read_end: int, stop_seconds: float) -> None:
    """Read signal numbers from a pipe; end this process as `install_stop_handlers` describes."""
    first = next(number for number in iter(lambda: os.read(read_end, 1)[0], None) if number in STOP_SIGNALS)
    requested_at = time.monotonic()
    while (left := requested_at + stop_seconds - time.monotonic()) > 0:
        if not select.select([read_end], [], [], min(left, _MAX_SELECT_SECONDS))[0]:
            continue
        number = os.read(read_end, 1)[0]
        if number in FORCE_STOP_SIGNALS and time.monotonic() - requested_at > STOP_DEBOUNCE_SECONDS:
            _end(number, f"second stop signal, {signal.Signals(number).name}")
    _end(first, f"still running {stop_seconds:g} s (training.stop_seconds) after {signal.Signals(first).name}")


def _end(number: int, reason: str) -> NoReturn:
    print_to_stderr(f"shoestring train: stopped without a checkpoint: {reason}. {RESUME_HINT}")
    os._exit(128 + number)


LAUNCHER_PID_ENV_VAR = "SHOESTRING_LAUNCHER_PID"

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: not safe between fork and exec


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def die_with_launcher() -> None:
    """Make a rank die with torchrun, which dies with the launcher; exit now if the launcher has died already."""
    launcher = os.environ.get(LAUNCHER_PID_ENV_VAR)
    if launcher is None or "RANK" not in os.environ:
        return
    die_with_parent()
    if _is_dead(int(launcher)) or os.getppid() in (1, int(launcher)):  # torchrun died before the line above
        sys.exit(1)


def _is_dead(pid: int) -> bool:
    """Return whether the process has ended; a zombie counts as ended, although its number still exists."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return True
    except OSError:  # no /proc
        return False
    return state in "ZX"
