"""Terms and units of the ledger, and the published budget of DeepSeek-V3 (V3 report Table 1)."""

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
"""Pre-training rate. 14.8 trillion tokens at this rate are exactly the 2,664 K above, without restarts or stalls."""
PUBLISHED_USD_PER_GPU_HOUR = 2.0
"""Rental price of an H800 that the report assumes."""

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
"""Buckets that rank 0 charges in addition to steps."""

LEDGER_BUCKETS: Mapping[str, str] = MappingProxyType(
    {
        "initialization": "from the launch to the first step",
        **CHARGED_BUCKETS,
        "skipped": "steps dropped because loss or gradient was NaN/Inf",
        "hang": "from rank 0's last record before a crash to the crash record, its next start or the last heartbeat",
        "restart": "from the crash record, or without one from rank 0's next start, to the first step after it",
        "idle": "processes still up after training ended",
    }
)
"""Buckets of time outside steps. Those that are not in `CHARGED_BUCKETS` follow from the kinds and times of records."""

_LABELS: Mapping[str, str] = MappingProxyType(
    {
        "telemetry": "logging",
        "stall": "host stall",
        EXPOSED_ALL_TO_ALL: "all-to-all not overlapped",
        GRADIENT_SYNC_WAIT: "gradient-sync wait",
        "pre_train": "pre-training",
        "post_training": "post-training",
    }
)


def to_label(name: str) -> str:
    """Return the text that tables show for a bucket, term or phase."""
    return _LABELS.get(name, name.replace("_", " "))


INSTRUCTIONS = ("F", "I", "W", "B", "FB")
"""Instructions of a pipeline program, without the all-to-alls that they wait for."""
STEP_TIME_TERMS = (*INSTRUCTIONS, EXPOSED_ALL_TO_ALL, PIPELINE_WAIT, GRADIENT_SYNC_WAIT, OPTIMIZER)
"""Disjoint terms of productive time on each rank. The rest of a step is `other`."""

TERM_MEANINGS: Mapping[str, str] = MappingProxyType(
    {
        "F": "forward",
        "I": "gradients of inputs",
        "W": "gradients of weights",
        "B": "whole backward",
        "FB": "forward and backward, overlapped",
        "exposed_all_to_all": "waiting for the tokens of an all-to-all",
        "pipeline_wait": "waiting for a pipeline neighbor",
        "gradient_sync_wait": "waiting for reductions over ranks",
        "optimizer": "weight update",
        "other": "the rest of the step",
    }
)
"""Meanings of `STEP_TIME_TERMS` and `other`."""
PAPER_TERM_MEANINGS: Mapping[str, str] = MappingProxyType(
    {
        **TERM_MEANINGS,
        "1F": "F",
        "bubble": "pipeline wait of the ideal schedule (derived)",
        "imbalance": "the rest of pipeline wait (derived)",
        "1B": "I and B",
        "1W": "W",
        "1F1B": "FB",
        "opt": "optimizer",
    }
)
"""Meanings of the terms that `to_paper_terms` returns."""

LEDGER_FORMAT = 2
"""Number in each record that opens an attempt; without it, the format is 1, whose terms and buckets had other names."""

Amount = TypeVar("Amount", int, float)

ALLOCATION_FILE = Path("ledger", "allocation.jsonl")
HEARTBEAT_FILE = Path("ledger", "heartbeat.json")
WORK_FILE = Path("ledger", "work.jsonl")
SNAPSHOT_FILE = Path("ledger", "snapshot.json")

_MS_PER_HOUR = 3_600_000


def to_paper_terms(terms: Mapping[str, Amount], bubble: Amount | None) -> dict[str, Amount]:
    """Rename `terms` to those of the Insights paper (arXiv 2505.09343, table 4), for plans, ledgers and timelines.

    Instructions exclude the all-to-alls that they wait for. `bubble` is the pipeline wait of the ideal program
    (`ideal_bubble_time`), imbalance the rest of pipeline_wait; opt is the update alone. Terms without a row in that
    table keep their names, as does pipeline_wait if `bubble` is None. The sum of the values does not change.
    """
    renamed, shown = {"1F": terms["F"]}, {*INSTRUCTIONS, OPTIMIZER}
    if bubble is not None:
        renamed |= {"bubble": bubble, "imbalance": terms[PIPELINE_WAIT] - bubble}
        shown.add(PIPELINE_WAIT)
    renamed |= {"1B": terms["I"] + terms["B"], "1W": terms["W"], "1F1B": terms["FB"], "opt": terms[OPTIMIZER]}
    return renamed | {name: spent for name, spent in terms.items() if name not in shown}


def to_gpu_hours(gpu_ms: int) -> float:
    """Convert GPU-milliseconds to GPU-hours."""
    return gpu_ms / _MS_PER_HOUR
