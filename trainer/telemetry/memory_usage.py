"""Memory use of a rank: of the GPU's allocator, or on a CPU of the process."""

from collections.abc import Sequence
from pathlib import Path

import torch

from .events import MemoryMeasured

ALLOCATED_LABEL = "allocated on the GPU"
RESIDENT_LABEL = "resident set size of the process"
_STATUS = Path("/proc/self/status")


def measure_memory(device: torch.device) -> tuple[int, int] | None:
    """Return current and peak bytes since the start of this process; None if unknown (a CPU without Linux)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    # Not `ru_maxrss`: it starts at the value of the parent process.
    return parse_resident_memory(_STATUS.read_text()) if _STATUS.exists() else None


def parse_resident_memory(status: str) -> tuple[int, int] | None:
    """Return current and peak resident bytes from the text of `/proc/self/status`; None if they are missing."""
    kilobytes = {
        name: int(value.split()[0])
        for name, _, value in (line.partition(":") for line in status.splitlines())
        if name in ("VmRSS", "VmHWM")
    }
    return (1024 * kilobytes["VmRSS"], 1024 * kilobytes["VmHWM"]) if len(kilobytes) == 2 else None


def memory_event(step: int, device: torch.device, ranks: Sequence[tuple[int, int] | None]) -> MemoryMeasured | None:
    """Return the event of every rank's current and peak bytes after step `step`; None if they are unknown for any."""
    known = [use for use in ranks if use is not None]
    if len(known) < len(ranks):
        return None
    on_gpu = device.type == "cuda"
    return MemoryMeasured(
        step=step,
        quantity=ALLOCATED_LABEL if on_gpu else RESIDENT_LABEL,
        limit=torch.cuda.get_device_properties(device).total_memory if on_gpu else None,
        now=[now for now, _ in known],
        peak=[peak for _, peak in known],
    )
