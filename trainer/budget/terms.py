"""The words and units of the ledger, and the budget that DeepSeek-V3 published (V3 report Table 1)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

PUBLISHED_GPU_HOURS: Mapping[str, int] = MappingProxyType(
    {"pre_train": 2_664_000, "context_extension": 119_000, "post_training": 5_000}
)
"""H800 GPU-hours of each phase."""
PUBLISHED_TOTAL_GPU_HOURS = 2_788_000
PUBLISHED_GPU_HOURS_PER_TRILLION_TOKENS = 180_000
"""Of pre-training. 14.8 trillion tokens at this rate are exactly the 2,664 K above: no restart or stall is in it."""

BUCKETS: Mapping[str, str] = MappingProxyType(
    {
        "initialisation": "from the launch to the first step",
        "data_stall": "waiting for the next batch",
        "checkpoint_save": "blocked while a checkpoint is saved",
        "checkpoint_load": "loading a checkpoint",
        "evaluation": "validation loss and samples",
        "recovery": "from the last sign of a crashed life to the next life's first step",
    }
)
"""What rank 0 charges besides steps. `rolled_back`, `idle` and `unknown` are found by the summary."""

ALLOCATION_FILE = Path("ledger", "allocation.jsonl")
WORK_FILE = Path("ledger", "work.jsonl")

_MS_PER_HOUR = 3_600_000


def gpu_hours(gpu_ms: int) -> float:
    """GPU-milliseconds in GPU-hours."""
    return gpu_ms / _MS_PER_HOUR


def gpu_milliseconds(hours: float) -> int:
    """GPU-hours in GPU-milliseconds, rounded to the nearest."""
    return round(hours * _MS_PER_HOUR)
