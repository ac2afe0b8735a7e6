"""`shoestring train` as real processes, observed from outside."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any


def command(overrides: Sequence[str], run_dir: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "shoestring.launch.cli", "train", *overrides, f"training.run_dir={run_dir}", *more]


def train(overrides: Sequence[str], run_dir: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(overrides, run_dir, *more), capture_output=True, text=True, timeout=120, check=False)


def lines_as_they_come(path: Path, process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """Yield lines of a file that a process is still writing; between polls only the scheduler pauses."""
    position = 0
    while process.poll() is None:
        if path.exists():
            with path.open() as file:
                file.seek(position)
                for line in file:
                    if not line.endswith("\n"):
                        break
                    position += len(line.encode())
                    yield json.loads(line)
        os.sched_yield()


def wait_for_step(run_dir: Path, process: subprocess.Popen[str], step: int = 1) -> None:
    for event in lines_as_they_come(run_dir / "metrics.jsonl", process):
        if event["kind"] == "step" and event["step"] >= step:
            return
    raise AssertionError(f"the run ended with {process.returncode} before step {step}")


def processes_of(run_dir: Path) -> dict[int, str]:
    """Return every process whose command line names the run directory: launcher, torchrun and ranks."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                line = (entry / "cmdline").read_bytes().decode().replace("\0", " ")
                if str(run_dir) in line:
                    found[int(entry.name)] = line
    return found


def torchrun_of(run_dir: Path) -> int:
    names = ("shoestring.launch.run.torchrun_agent", "torch.distributed.run")
    (torchrun,) = (pid for pid, line in processes_of(run_dir).items() if any(name in line for name in names))
    return torchrun


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ranks_of(run_dir: Path) -> list[int]:
    return children_of(torchrun_of(run_dir))


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        os.sched_yield()
