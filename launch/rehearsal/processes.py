"""Processes of rehearsed ranks: as many at a time as cores and memory allow, and none left behind."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from subprocess import Popen

from ...comm.units import format_giga
from ..run.launcher import raise_on_stop_signals
from ..run.rank_environment import build_rank_environment
from ..run.signals import die_with_parent
from ..run.torchrun import RanksFailed
from .log import RankLog

RANK_MODULE_ARGUMENTS = ("-m", "shoestring.launch.rehearsal.rank")
"""Python's arguments for the process of one rank; the paths of its specification and its log follow them."""
HOST_BYTES_PER_RANK = 10**9
"""Host memory per process: a rank of DeepSeek-V3 needs at most half of it (resident set, measured)."""

_LAST_LINES = 12
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class RehearsalRequest:
    """Parameters that all rehearsed ranks share."""

    overrides: tuple[str, ...]
    config_dir: str | None
    micro_batches: int | None
    shim: str
    """Path of the library that `build_autograd_shim` returns."""


def rehearse_ranks(
    request: RehearsalRequest,
    ranks: Sequence[int],
    report_progress: Callable[[str], None],
    max_processes: int,
    rank_arguments: Sequence[str] = RANK_MODULE_ARGUMENTS,
) -> tuple[RankLog, ...]:
    """Run one process per rank, `max_processes` at a time, and return their logs in the order of `ranks`.

    `report_progress` gets one line at the start and one per finished rank. Raises `RanksFailed` if a process fails, and
    `StoppedBySignal` for SIGINT and SIGTERM; no process and no file is left behind.
    """
    report_progress(f"rehearsing {len(ranks)} rank(s), {min(len(ranks), max_processes)} at a time")
    logs: dict[int, RankLog] = {}
    waiting, running = deque(ranks), dict[int, Popen[bytes]]()
    with raise_on_stop_signals(), tempfile.TemporaryDirectory(prefix="shoestring-rehearse-") as scratch:
        try:
            while waiting or running:
                while waiting and len(running) < max_processes:
                    rank = waiting.popleft()
                    running[rank] = _start(request, rank, Path(scratch), rank_arguments)
                rank = _first_ended(running)
                log = logs[rank] = _read_log(rank, running.pop(rank).returncode, Path(scratch))
                report_progress(_progress(log, len(logs), len(ranks)))
        finally:
            for process in running.values():
                process.kill()
                process.wait()
    return tuple(logs[rank] for rank in ranks)


def max_concurrent_processes() -> int:
    """Return the number of ranks for which this machine has cores and memory, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _available_bytes() // HOST_BYTES_PER_RANK))


def _available_bytes() -> int:
    """Return the memory available without swapping, or all memory if the kernel does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        (available,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(available) * 1024


def _files(scratch: Path, rank: int) -> tuple[Path, Path, Path]:
    """Return the files of a rank's specification, log and output."""
    return scratch / f"spec_{rank}", scratch / f"log_{rank}", scratch / f"messages_{rank}"


def _start(request: RehearsalRequest, rank: int, scratch: Path, rank_arguments: Sequence[str]) -> Popen[bytes]:
    spec, log, messages = _files(scratch, rank)
    spec.write_text(json.dumps({**asdict(request), "rank": rank}))
    with messages.open("wb") as file:
        return Popen(
            [sys.executable, *rank_arguments, str(spec), str(log)],
            env=build_rank_environment(),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,  # Ctrl-C reaches only this process, which ends the ranks
            preexec_fn=die_with_parent,
        )


def _first_ended(running: Mapping[int, Popen[bytes]]) -> int:
    while True:
        for rank, process in running.items():
            if process.poll() is not None:
                return rank
        time.sleep(_POLL_SECONDS)


def _read_log(rank: int, code: int, scratch: Path) -> RankLog:
    _, log, output = _files(scratch, rank)
    if code == 0 and log.exists():
        return RankLog.read(log)
    messages = output.read_text(errors="replace").strip().splitlines()[-_LAST_LINES:]
    outcome = f"was killed by signal {-code} (9: possibly out of memory)" if code < 0 else f"exited with {code}"
    lines = "".join(f"\n  {line}" for line in messages) or " none"
    raise RanksFailed(f"the process of rank {rank} {outcome} and wrote no log; its output:{lines}")


def _progress(log: RankLog, done: int, total: int) -> str:
    peak = f"{format_giga(log.memory.peak_bytes)} GB" if log.memory.peak_bytes else "0 GB"
    rank = f"rank {log.rank} (pipeline rank {log.pp_rank})"
    return f"{done}/{total}  {rank}: {log.seconds:.1f} s, peak {peak}, {len(log.findings)} finding(s)"
