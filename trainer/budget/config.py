"""The budget a run is held to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ...comm.refusal import Problem
from .terms import PUBLISHED_GPU_HOURS


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """What the run may cost, and which part of the published budget it stands beside."""

    gpu_hours: float
    """This run's own budget. One rank is one GPU, also on CPU."""
    phase: str = "pre_train"
    """`pre_train`, `context_extension` or `post_training`."""

    def problems(self) -> Iterator[Problem]:
        """What is impossible about these values on their own."""
        if not (self.gpu_hours > 0 and math.isfinite(self.gpu_hours)):
            yield Problem("gpu_hours", self.gpu_hours, "must be greater than 0 and finite")
        if self.phase not in PUBLISHED_GPU_HOURS:
            yield Problem("phase", self.phase, f"must be one of {', '.join(PUBLISHED_GPU_HOURS)}")
