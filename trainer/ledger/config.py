"""The budget a run is held to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ...comm.errors import Problem
from .terms import PUBLISHED_GPU_HOURS


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """What the run may cost, and which part of the published budget it stands beside."""

    gpu_hours: float
    """This run's own budget. One rank is one GPU, also on CPU."""
    phase: str = "pre_train"
    """`pre_train`, `context_extension` or `post_training`."""
    project: str | None = None
    """A project file (`shoestring budget FILE`): what its other runs of this phase have spent is gone for this one."""
    warn_at: float = 0.9
    """Warn when the cost projected at the end of the run passes this share of the budget."""
    stop_at: float | None = 1.0
    """Halt with a checkpoint when it passes this share; null: only when the budget itself is used up."""
    planned_gpu_hours: float | None = None
    """What a plan says that the run costs. A run is refused to start that is planned to cost more than what is left."""
    allow_over_plan: bool = False
    """Start it all the same."""

    def problems(self) -> Iterator[Problem]:
        """What is impossible about these values on their own."""
        for name in ("gpu_hours", "warn_at", "stop_at", "planned_gpu_hours"):
            value = self.__dict__[name]
            if value is not None and not (value > 0 and math.isfinite(value)):
                yield Problem(name, value, "must be greater than 0 and finite")
        if self.phase not in PUBLISHED_GPU_HOURS:
            yield Problem("phase", self.phase, f"must be one of {', '.join(PUBLISHED_GPU_HOURS)}")
        if self.project == "":
            yield Problem("project", self.project, "must name a file; null for none")
