"""Memory of a rank: on a CPU the resident memory that the kernel reports."""

import mmap
from pathlib import Path

import pytest
import torch

from shoestring.trainer.telemetry.format import describe_event
from shoestring.trainer.telemetry.memory_usage import (
    RESIDENT_LABEL,
    measure_memory,
    memory_event,
    parse_resident_memory,
)

CPU = torch.device("cpu")


def test_the_kernels_memory_figures_are_read() -> None:
    assert parse_resident_memory("Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n") == (2**20, 2**21)
    assert parse_resident_memory("Name:\tpython\n") is None


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="not Linux")
def test_what_is_allocated_is_seen() -> None:
    before, size = measure_memory(CPU), 50_000_000
    # Pages from the kernel: torch's allocator may reuse memory that an earlier test has freed.
    with mmap.mmap(-1, size) as block:
        block.write(b"\1" * size)
        after = measure_memory(CPU)
    assert before is not None
    assert after is not None
    assert after[0] - before[0] == pytest.approx(size, rel=0.1)
    assert after[1] >= after[0]


def test_memory_of_all_ranks_is_shown_or_of_none() -> None:
    event = memory_event(5, CPU, [(10, 20), (30, 40)])
    assert event is not None
    expected = {"quantity": RESIDENT_LABEL, "limit": None, "now": [10, 30], "peak": [20, 40]}
    assert (event.step, event.values) == (5, expected)
    assert memory_event(5, CPU, [(10, 20), None]) is None


def test_the_terminal_names_the_fullest_rank() -> None:
    event = memory_event(50, CPU, [(10_000_000, 420_000_000), (31_400_000, 40_000_000)])
    assert event is not None
    assert describe_event(event) == "step 50: memory: 31.4 MB on the largest rank (peak 420 MB)"
