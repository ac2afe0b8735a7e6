"""For tests with pretended machines: when to skip them, and what of them is still there."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shoestring.launch.cluster.namespaces import namespace_problems

MISSING = [str(problem) for problem in namespace_problems()]
needs_machines = pytest.mark.skipif(bool(MISSING), reason=f"no simulated cluster here: {'; '.join(MISSING)}")


def descendants(pid: int) -> set[int]:
    """Every process that `pid` or one of its own has started. Those of a machine all are: none can leave its `cat`."""
    found = set()
    with contextlib.suppress(OSError):  # it has ended meanwhile
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found |= {child, *descendants(child)}
    return found


def alive(pids: set[int]) -> set[int]:
    """Those that run. A zombie whose new parent never asks for it does not."""
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            found |= {pid} - ({pid} if state == "Z" else set())
    return found


def wait_until(what: Callable[[], bool], seconds: float) -> None:
    """Look again and again; what is looked at is the kernel's or another process's."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"not so after {seconds} s"
        os.sched_yield()
