"""Configuration of a run's budget."""

from dataclasses import dataclass

from ...comm.files.ranges import CheckedConfig, above, not_empty, one_of
from .terms import PUBLISHED_GPU_HOURS


@dataclass(frozen=True, kw_only=True)
class BudgetConfig(CheckedConfig):
    """Budget of a run, and the published phase that it is compared with."""

    gpu_hours: float = above(0)
    """Budget of this run. One rank is one GPU, also on CPU."""
    phase: str = one_of(PUBLISHED_GPU_HOURS, "pre_train")
    """Phase of training that the run belongs to."""
    project: str | None = not_empty(None, "must name a file; null for none")
    """Project file (`shoestring budget FILE`): runs of one phase share the project's budget of that phase."""
    warn_at: float = above(0, 0.9)
    """Warn when the cost projected at the end of the run passes this share of the budget."""
    stop_at: float | None = above(0, 1.0)
    """Halt with a checkpoint when the projection passes this share; null: only when the budget is used up."""
    planned_gpu_hours: float | None = above(0, None)
    """Planned cost of the run. A run whose planned cost exceeds the remaining budget does not start."""
    allow_over_plan: bool = False
    """Start the run even if its planned cost exceeds the remaining budget."""
