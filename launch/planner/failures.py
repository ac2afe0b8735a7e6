"""What failures cost at scale: effective training time, and how often a checkpoint pays.

Young's and Daly's first-order model: with a failure every M seconds, a checkpoint every t seconds that blocks for d and
a restart that takes r, the lost share is d/t + t/(2 M) + r/M, least at t = sqrt(2 d M).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

GPU_HOURS_BETWEEN_FAILURES = 16_384 * 54 * 24 / 419
"""Published: 419 unexpected interruptions in 54 days on 16,384 GPUs (Llama 3.1, arXiv 2407.21783)."""


@dataclass(frozen=True)
class Failures:
    """Inputs, all of them to be replaced by those of the cluster at hand. The last two are assumed."""

    gpu_hours_between: float = GPU_HOURS_BETWEEN_FAILURES
    checkpoint_seconds: float = 10.0
    """For which a checkpoint blocks the step."""
    restart_seconds: float = 600.0
    """From a failure to the next step, without the steps that are run again."""

    def mean_seconds_between(self, gpus: int) -> float:
        """M, of a run on so many GPUs."""
        return self.gpu_hours_between * 3600 / gpus

    def best_interval(self, gpus: int) -> float:
        """Seconds between checkpoints that lose least."""
        return math.sqrt(2 * self.checkpoint_seconds * self.mean_seconds_between(gpus))

    def effective_share(self, gpus: int) -> float:
        """Of the allocated time, what is spent on steps that stay, with the best interval."""
        mean, interval = self.mean_seconds_between(gpus), self.best_interval(gpus)
        lost = self.checkpoint_seconds / interval + interval / (2 * mean) + self.restart_seconds / mean
        return max(0.0, 1 - lost)
