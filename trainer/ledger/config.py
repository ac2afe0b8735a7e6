"""Configuration of a run's budget."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ...comm.errors import Problem
from .terms import PUBLISHED_GPU_HOURS


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """Budget of a run, and the published phase that it is compared with."""

    gpu_hours: float
    """Budget of this run. One rank is one GPU, also on CPU."""
    phase: str = "pre_train"
    """`pre_train`, `context_extension` or `post_training`."""
    project: str | None = None
    """Project file (`shoestring budget FILE`): runs of one phase share the project's budget of that phase."""
    warn_at: float = 0.9
    """Warn when the cost projected at the end of the run passes this share of the budget."""
    stop_at: float | None = 1.0
    """Halt with a checkpoint when the projection passes this share; null: only when the budget is used up."""
    planned_gpu_hours: float | None = None
    """Planned cost of the run. A run whose planned cost exceeds the remaining budget does not start."""
    allow_over_plan: bool = False
    """Start the run even if its planned cost exceeds the remaining budget."""

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for each invalid value."""
        for name in ("gpu_hours", "warn_at", "stop_at", "planned_gpu_hours"):
            value = self.__dict__[name]
            if value is not None and not (value > 0 and math.isfinite(value)):
                yield Problem(name, value, "must be greater than 0 and finite")
        if self.phase not in PUBLISHED_GPU_HOURS:
            yield Problem("phase", self.phase, f"must be one of {', '.join(PUBLISHED_GPU_HOURS)}")
        if self.project == "":
            yield Problem("project", self.project, "must name a file; null for none")
