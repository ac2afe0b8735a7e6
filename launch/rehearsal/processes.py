"""The rehearsed ranks' processes: as many at a time as there are cores and memory for, and none left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from subprocess import Popen

from ..run.launcher import raise_on_stop_signals
from ..run.rank_environment import build_rank_environment
from ..run.signals import die_with_parent
from ..run.torchrun import RanksFailed
from .log import RankLog

RANK_MODULE_ARGUMENTS = ("-m", "shoestring.launch.rehearsal.rank")
"""Arguments of Python for the process of one rank; a specification and the path of its log come behind them."""
HOST_BYTES_PER_RANK = 10**9
"""Of the host, for a process: a rank of DeepSeek-V3 takes half of it at most (resident set, measured)."""

_LAST_LINES = 12
_LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class RehearsalRequest:
    """What all rehearsed ranks have in common."""

    overrides: tuple[str, ...]
    config_dir: str | None
    micro_batches: int | None
    shim: str
    """Path of the library that `shim.build_shim` has made."""


@dataclass(frozen=True)
class _Running:
    """A rank's process and its files."""

    rank: int
    process: Popen[bytes]
    output: Path
    said: Path


def rehearse_ranks(
    request: RehearsalRequest,
    ranks: Sequence[int],
    report_progress: Callable[[str], None],
    max_processes: int,
    rank_arguments: Sequence[str] = RANK_MODULE_ARGUMENTS,
) -> tuple[RankLog, ...]:
    """Run a process for each rank to its end, `at_once` at a time, and return their logs in the order of `ranks`.

    `tell` gets a line at once and one for each rank that has ended. Raises `RanksFailed` for a process that dies, and
    `Stopped` for SIGINT and SIGTERM; in any case no process and no file stays.
    """
    report_progress(f"rehearsing {len(ranks)} rank(s), {min(len(ranks), max_processes)} at a time")
    logs: dict[int, RankLog] = {}
    waiting, running = deque(ranks), list[_Running]()
    with raise_on_stop_signals(), tempfile.TemporaryDirectory(prefix="shoestring-rehearse-") as scratch:
        try:
            while waiting or running:
                while waiting and len(running) < max_processes:
                    running.append(_start(request, waiting.popleft(), Path(scratch), rank_arguments))
                ended = _first_ended(running)
                running.remove(ended)
                log = logs[ended.rank] = _log_of(ended)
                report_progress(_progress(log, len(logs), len(ranks)))
        finally:
            for left in running:
                left.process.kill()
                left.process.wait()
    return tuple(logs[rank] for rank in ranks)


def max_concurrent_processes() -> int:
    """Return for how many ranks this machine has cores and memory; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _available_bytes() // HOST_BYTES_PER_RANK))


def _available_bytes() -> int:
    """Memory that processes can have without swapping; where Linux does not say, all that there is."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        (available,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(available) * 1024


def _start(request: RehearsalRequest, rank: int, scratch: Path, entry: Sequence[str]) -> _Running:
    spec, output, said = (scratch / f"{name}_{rank}" for name in ("spec", "log", "said"))
    spec.write_text(json.dumps({**asdict(request), "rank": rank}))
    command = [sys.executable, *entry, str(spec), str(output)]
    with said.open("wb") as file:
        process = Popen(
            command,
            env=build_rank_environment(),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,  # Ctrl-C reaches this process alone, which ends them
            preexec_fn=die_with_parent,
        )
    return _Running(rank, process, output, said)


def _first_ended(running: Sequence[_Running]) -> _Running:
    while True:
        for each in running:
            if each.process.poll() is not None:
                return each
        time.sleep(_LOOK_SECONDS)


def _log_of(ended: _Running) -> RankLog:
    code = ended.process.returncode
    if code == 0 and ended.output.exists():
        return RankLog.read(ended.output)
    said = ended.said.read_text(errors="replace").strip().splitlines()[-_LAST_LINES:]
    how = f"was killed by signal {-code}, where memory is short by the kernel" if code < 0 else f"ended with {code}"
    words = "".join(f"\n  {line}" for line in said) or " nothing"
    raise RanksFailed(f"the process of rank {ended.rank} {how} and left no log; it said:{words}")


def _progress(log: RankLog, done: int, of: int) -> str:
    peak = f"{log.memory.peak / 1e9:.2f} GB" if log.memory.peak else "nothing"
    where = f"rank {log.rank} (pipeline position {log.pp_rank})"
    return f"{done}/{of}  {where}: {log.seconds:.1f} s, peak {peak}, {len(log.findings)} finding(s) of its own"
