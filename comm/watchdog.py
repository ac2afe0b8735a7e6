"""A thread that ends a rank whose call into the communication library does not return.

NCCL may block the calling host thread for ever: where it connects, until the peer calls too; where the device's queue
is full, until a message comes. torch's own watchdog does not see the former, for it counts what has been launched.
Not yet run on hardware.
"""

from __future__ import annotations

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
"""The flight recorder asks CUDA for the state of its events, which may hang too. Then the rank ends without it."""
MAX_PEERS_SHOWN = 8


@dataclass(frozen=True)
class _Call:
    what: object
    peers: Sequence[int]
    began: float


class Watchdog:
    """Looks once a `period` at the calls under way in this process.

    A call longer than `limit` is named on `output` with its peers; then come the stack of every thread and PyTorch's
    flight recorder, and the process ends with 1, so that torchrun ends the other ranks.
    """

    timeout: timedelta
    """May be changed at any time: starting takes longer than a step."""

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
        """The flight recorder is written into `folder`. Nobody looks before `start`."""
        self.timeout = timeout
        self._rank, self._folder = rank, folder
        self._clock, self._leave, self._output = clock, exit_process, output
        self._calls: dict[int, _Call] = {}
        self._closed = threading.Event()

    def start(self, period: float = 1.0) -> None:
        """Look every `period` seconds, in a thread of its own, until `close`."""
        threading.Thread(target=self._run, args=(period,), name="watchdog", daemon=True).start()

    def close(self) -> None:
        """Look no more."""
        self._closed.set()

    @contextmanager
    def watch_call(self, what: object, peers: Sequence[int]) -> Iterator[None]:
        """Watch the call that is made inside, of any thread. `what` is turned into text only if it does not return."""
        call = _Call(what, peers, self._clock())
        self._calls[id(call)] = call
        try:
            yield
        finally:
            del self._calls[id(call)]

    def exit_if_overdue(self) -> None:
        """End the process if a call is overdue."""
        now, limit = self._clock(), self.timeout.total_seconds()
        overdue = [call for call in self._calls.copy().values() if now - call.began > limit]
        if overdue:
            self._tell(overdue, now)
            self._leave(1)

    def _run(self, period: float) -> None:
        while not self._closed.wait(period):
            self.exit_if_overdue()

    def _tell(self, overdue: Sequence[_Call], now: float) -> None:
        for call in overdue:
            with_whom, seconds = _peers(call.peers, self._rank), now - call.began
            words = f"{call.what} with {with_whom} has not returned from the communication library"
            self._print(f"rank {self._rank}: {words} for {seconds:.0f} s (limit {self.timeout.total_seconds():g} s)")
        faulthandler.dump_traceback(self._output, all_threads=True)
        faulthandler.dump_traceback_later(DUMP_TIMEOUT_SECONDS, exit=True, file=self._output)
        self._print(f"rank {self._rank}: {dump_flight_recorder(self._folder, self._rank)}")
        faulthandler.cancel_dump_traceback_later()

    def _print(self, words: str) -> None:
        print(f"shoestring: {words}", file=self._output, flush=True)


def dump_flight_recorder(folder: Path, rank: int) -> str:
    """Write what PyTorch has recorded of this process's collectives into `folder`; return where, or why not."""
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
    except Exception as error:
        return f"PyTorch's flight recorder could not be written: {error}"
    return f"PyTorch's flight recorder, {entries} entries, is in {path}; read it with torchfrtrace {folder} -p rank_"


def _find_dump() -> Callable[[], bytes] | None:
    """NCCL's where torch is built with it, else that of its other backends."""
    library: Any = getattr(torch._C, "_distributed_c10d", None)
    found: Callable[[], bytes] | None = getattr(library, "_dump_nccl_trace", None)
    return found or getattr(library, "_dump_fr_trace", None)


def _peers(peers: Sequence[int], rank: int) -> str:
    others = [str(peer) for peer in dict.fromkeys(peers) if peer != rank]
    more = len(others) - MAX_PEERS_SHOWN
    return f"ranks {', '.join(others[:MAX_PEERS_SHOWN])}" + (f" and {more} more" if more > 0 else "")
