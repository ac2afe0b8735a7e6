"""The words and units of the ledger, and the budget that DeepSeek-V3 published (V3 report Table 1)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from ...comm.trace import EXPOSED_ALL_TO_ALL, GRADIENT_SYNC_WAIT, OPTIMIZER, PIPELINE_WAIT

PUBLISHED_GPU_HOURS: Mapping[str, int] = MappingProxyType(
    {"pre_train": 2_664_000, "context_extension": 119_000, "post_training": 5_000}
)
"""H800 GPU-hours of each phase."""
PUBLISHED_TOTAL_GPU_HOURS = 2_788_000
PUBLISHED_GPU_HOURS_PER_TRILLION_TOKENS = 180_000
"""Of pre-training. 14.8 trillion tokens at this rate are exactly the 2,664 K above: no restart or stall is in it."""
PUBLISHED_USD_PER_GPU_HOUR = 2.0
"""The report's assumption about what renting an H800 costs."""

CHARGED_BUCKETS: Mapping[str, str] = MappingProxyType(
    {
        "data_stall": "waiting for the next batch",
        "checkpoint_save": "blocked while a checkpoint is saved",
        "checkpoint_load": "loading a checkpoint",
        "evaluation": "validation loss and samples",
        "telemetry": "writing the ledger and metrics, on rank 0",
        "stall": "rank 0 stopped, or waiting for a disk, between steps",
    }
)
"""Buckets that rank 0 charges besides steps."""

LEDGER_BUCKETS: Mapping[str, str] = MappingProxyType(
    {
        "initialization": "from the launch to the first step",
        **CHARGED_BUCKETS,
        "skipped": "steps that changed no weight: not finite",
        "hang": "from the last sign of a life that died to its end",
        "restart": "from a death to the next life's first step",
        "idle": "held after the run was done",
    }
)
"""Where time goes that is not of steps. What `CHARGED_BUCKETS` lacks follows from what the records are and when they came."""

INSTRUCTIONS = ("F", "I", "W", "B", "FB")
"""Instructions of a pipeline program, net of the exchanges that they wait for."""
STEP_TIME_TERMS = (*INSTRUCTIONS, EXPOSED_ALL_TO_ALL, PIPELINE_WAIT, GRADIENT_SYNC_WAIT, OPTIMIZER)
"""What productive time is split into, disjoint on each rank. The rest of a step is `other`."""

LEDGER_FORMAT = 2
"""Number in each record that opens an attempt; without it, the format is 1, whose terms and buckets had other names."""

Amount = TypeVar("Amount", int, float)

ALLOCATION_FILE = Path("ledger", "allocation.jsonl")
HEARTBEAT_FILE = Path("ledger", "heartbeat.json")
WORK_FILE = Path("ledger", "work.jsonl")
SNAPSHOT_FILE = Path("ledger", "snapshot.json")

_MS_PER_HOUR = 3_600_000


def to_paper_terms(terms: Mapping[str, Amount], bubble: Amount | None) -> dict[str, Amount]:
    """`terms` under the names of the Insights paper (arXiv 2505.09343, table 4): of plans, ledgers and timelines alike.

    Instructions are net of the exchanges that they wait for; `bubble` is what of pipeline_wait the program has by itself
    (`ideal_wait`) and imbalance the rest of it; opt is the update alone. What that table has no row for keeps its name,
    and so does pipeline_wait where nobody knows `bubble`. The parts add up to what `terms` do.
    """
    own, shown = {"1F": terms["F"]}, {*INSTRUCTIONS, OPTIMIZER}
    if bubble is not None:
        own |= {"bubble": bubble, "imbalance": terms[PIPELINE_WAIT] - bubble}
        shown.add(PIPELINE_WAIT)
    own |= {"1B": terms["I"] + terms["B"], "1W": terms["W"], "1F1B": terms["FB"], "opt": terms[OPTIMIZER]}
    return own | {name: spent for name, spent in terms.items() if name not in shown}


def to_gpu_hours(gpu_ms: int) -> float:
    """GPU-milliseconds in GPU-hours."""
    return gpu_ms / _MS_PER_HOUR
