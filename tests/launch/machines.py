"""Helpers for tests with simulated machines: a skip condition, and the processes that are left."""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shoestring.launch.cluster.simulated_cluster import namespace_problems

MISSING = [str(problem) for problem in namespace_problems()]
needs_machines = pytest.mark.skipif(bool(MISSING), reason=f"no simulated cluster here: {'; '.join(MISSING)}")


def descendants(pid: int) -> set[int]:
    """Return every direct or indirect child of `pid`. A machine's processes are all below its `cat`."""
    found = set()
    with contextlib.suppress(OSError):  # it has ended meanwhile
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found |= {child, *descendants(child)}
    return found


def alive(pids: set[int]) -> set[int]:
    """Return the processes that run; zombies do not count."""
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            found |= {pid} - ({pid} if state == "Z" else set())
    return found


def wait_until(what: Callable[[], bool], seconds: float) -> None:
    """Poll until `what` is true; another process or the kernel changes it."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"not so after {seconds} s"
        os.sched_yield()
