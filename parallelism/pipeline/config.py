"""Configuration of the pipeline schedule."""

from dataclasses import dataclass

from ...comm.files.ranges import CheckedConfig, between, one_of
from .schedules.registry import SCHEDULES


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(CheckedConfig):
    """Pipeline schedule, micro-batch size, and the split of layers into stages."""

    name: str = one_of((schedule.name for schedule in SCHEDULES), "1f1b")
    """Pipeline schedule; `shoestring schedule` draws them."""
    micro_batch_size: int = between(1, 2**20, 1)
    """Sequences per micro-batch and rank."""
    chunks: int | None = between(1, 4096, None)
    """Stages per rank, for `interleaved`; null: the number that the schedule requires."""
    layers_per_stage: tuple[int, ...] | None = None
    """Number of layers of each stage, as a list; null: balanced by FLOPs (see `shoestring partition`)."""
    overlap: bool = True
    """Overlap the forward and the backward of an FB instruction: one computes while the other waits for its all-to-all.
    false: the forward runs first. The results are identical to the last bit."""
