"""How much memory a rank uses: what its device's allocator holds, or on a CPU what the kernel says of the process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from .events import JSON

ALLOCATED_LABEL = "allocated on the GPU"
RESIDENT_LABEL = "resident in the process, Python and libraries included"
_STATUS = Path("/proc/self/status")


def measure_memory(device: torch.device) -> tuple[int, int] | None:
    """Bytes now, and at the worst moment since the start of this process; None where nobody says (a CPU, not Linux)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    # Not `ru_maxrss`, which begins with that of the process that has started this one.
    return parse_resident_memory(_STATUS.read_text()) if _STATUS.exists() else None


def parse_resident_memory(status: str) -> tuple[int, int] | None:
    """Bytes resident now and at most, from the text of `/proc/self/status`; None where it does not say."""
    kilobytes = {
        name: int(value.split()[0])
        for name, _, value in (line.partition(":") for line in status.splitlines())
        if name in ("VmRSS", "VmHWM")
    }
    return (1024 * kilobytes["VmRSS"], 1024 * kilobytes["VmHWM"]) if len(kilobytes) == 2 else None


def memory_metrics(device: torch.device, ranks: Sequence[tuple[int, int] | None]) -> Mapping[str, JSON]:
    """For the event stream: bytes of every rank, now and at most, and what they are bytes of; {} where nobody says."""
    known = [use for use in ranks if use is not None]
    if len(known) < len(ranks):
        return {}
    on_gpu = device.type == "cuda"
    return {
        "of": ALLOCATED_LABEL if on_gpu else RESIDENT_LABEL,
        "limit": torch.cuda.get_device_properties(device).total_memory if on_gpu else None,
        "now": [now for now, _ in known],
        "peak": [peak for _, peak in known],
    }
