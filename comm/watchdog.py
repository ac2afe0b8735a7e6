"""Watchdog thread that ends a rank whose call into the communication library does not return.

Not yet run on hardware.
"""

import faulthandler
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch

DUMP_TIMEOUT_SECONDS = 30
"""Longest time of writing the flight recorder."""
# It asks CUDA for the state of its events, which may hang too. The rank then ends without a dump.
MAX_PEERS_SHOWN = 8


@dataclass(frozen=True)
class _Call:
    what: object
    peers: Sequence[int]
    began: float


class Watchdog:
    """Checks the calls in progress in this process periodically.

    A call longer than `timeout` is reported on `output` with its peers, the stacks of all threads and PyTorch's flight
    recorder; the process then exits with 1, so that torchrun ends the other ranks.
    """

    # NCCL can block the calling host thread without limit: while it connects, until the peer calls too; while the
    # device's queue is full, until a message comes. torch's watchdog misses the former, since it watches only work that
    # has been launched.

    timeout: timedelta
    """Longest time of a call. May be changed at any time: the start takes longer than a step."""

    def __init__(
        self,
        rank: int,
        timeout: timedelta,
        folder: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
        exit_process: Callable[[int], object] = os._exit,
        output: TextIO = sys.stderr,
    ) -> None:
        """Write the flight recorder into `folder`. `start` begins the checks."""
        self.timeout = timeout
        self._rank, self._folder = rank, folder
        self._clock, self._exit_process, self._output = clock, exit_process, output
        self._calls: dict[int, _Call] = {}
        self._closed = threading.Event()

    def start(self, period: float = 1.0) -> None:
        """Check every `period` seconds on a background thread until `close`."""
        threading.Thread(target=self._run, args=(period,), name="watchdog", daemon=True).start()

    def close(self) -> None:
        """Stop the checks."""
        self._closed.set()

    @contextmanager
    def watch_call(self, what: object, peers: Sequence[int]) -> Iterator[None]:
        """Watch the call made inside the context, on any thread. `what` becomes text only in a report."""
        call = _Call(what, peers, self._clock())
        self._calls[id(call)] = call
        try:
            yield
        finally:
            del self._calls[id(call)]

    def exit_if_overdue(self) -> None:
        """Report and end the process if a call is overdue."""
        now, limit = self._clock(), self.timeout.total_seconds()
        # A copy: other threads add and remove calls meanwhile.
        overdue = [call for call in self._calls.copy().values() if now - call.began > limit]
        if overdue:
            self._report(overdue, now)
            self._exit_process(1)

    def _run(self, period: float) -> None:
        while not self._closed.wait(period):
            self.exit_if_overdue()

    def _report(self, overdue: Sequence[_Call], now: float) -> None:
        for call in overdue:
            others, seconds = _peers(call.peers, self._rank), now - call.began
            message = f"{call.what} with {others} has not returned from the communication library"
            self._print(f"rank {self._rank}: {message} for {seconds:.0f} s (limit {self.timeout.total_seconds():g} s)")
        faulthandler.dump_traceback(self._output, all_threads=True)
        # In C, on a thread that needs no GIL: it ends the process even if the dump hangs inside CUDA.
        faulthandler.dump_traceback_later(DUMP_TIMEOUT_SECONDS, exit=True, file=self._output)
        self._print(f"rank {self._rank}: {dump_flight_recorder(self._folder, self._rank)}")
        faulthandler.cancel_dump_traceback_later()

    def _print(self, message: str) -> None:
        print(f"shoestring: {message}", file=self._output, flush=True)


def dump_flight_recorder(folder: Path, rank: int) -> str:
    """Write PyTorch's record of this process's collectives into `folder`; return a message with the path or error."""
    dump = _find_dump()
    if dump is None:
        return f"PyTorch {torch.__version__} has no flight recorder"
    path = folder / f"rank_{rank}"
    try:
        recorded = dump()
        entries = len(pickle.loads(recorded).get("entries", ()))
        if not entries:
            return "PyTorch's flight recorder is empty; to have it record, set TORCH_FR_BUFFER_SIZE=2000"
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(recorded)
    except Exception as error:  # the rank ends anyway, and its report must not
        return f"PyTorch's flight recorder could not be written: {error}"
    return f"PyTorch's flight recorder, {entries} entries, is in {path}; read it with torchfrtrace {folder} -p rank_"


def _find_dump() -> Callable[[], bytes] | None:
    """Return the dump function of NCCL's flight recorder, or else that of the other backends; None if there is none."""
    library: Any = getattr(torch._C, "_distributed_c10d", None)
    found: Callable[[], bytes] | None = getattr(library, "_dump_nccl_trace", None)
    return found or getattr(library, "_dump_fr_trace", None)


def _peers(peers: Sequence[int], rank: int) -> str:
    others = [str(peer) for peer in dict.fromkeys(peers) if peer != rank]
    more = len(others) - MAX_PEERS_SHOWN
    return f"ranks {', '.join(others[:MAX_PEERS_SHOWN])}" + (f" and {more} more" if more > 0 else "")
