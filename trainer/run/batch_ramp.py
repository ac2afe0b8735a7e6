"""Batch size of each optimizer step: the batch ramp (report §4.2: from 3,072 to 15,360 sequences over 469 B tokens).

A step's size depends on its number alone, so neither a restart nor another grid of ranks changes which samples the
step takes.
"""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cache

from ...comm.units import ceil_div


@dataclass(frozen=True)
class BatchSizeLevel:
    """Consecutive steps of one batch size."""

    steps_before: int
    """Steps before the first step of this level."""
    samples_before: int
    """Samples consumed before the first step of this level."""
    batch_size: int
    """Sequences per step."""


@dataclass(frozen=True)
class BatchRamp:
    """Batch sizes of all steps of a run. Steps count from 1; samples are sequences."""

    levels: tuple[BatchSizeLevel, ...]
    """Levels in ascending order; the last one has no end."""

    @staticmethod
    def constant(size: int) -> "BatchRamp":
        """Return a ramp that has one batch size from the first step on."""
        return BatchRamp((BatchSizeLevel(0, 0, size),))

    def batch_size(self, step: int) -> int:
        """Return the sequences of step number `step`."""
        # bisect_left: steps count from 1, so step number `steps_before` still belongs to the level below.
        return self.levels[bisect_left(self.levels, step, key=lambda level: level.steps_before) - 1].batch_size

    def consumed_samples(self, steps: int) -> int:
        """Return the samples that the first `steps` steps consume."""
        level = self.levels[bisect_right(self.levels, steps, key=lambda level: level.steps_before) - 1]
        return level.samples_before + (steps - level.steps_before) * level.batch_size

    def steps_for_samples(self, samples: int) -> int:
        """Return the number of steps that consume at least `samples` samples."""
        if samples <= 0:
            return 0
        level = self.levels[bisect_left(self.levels, samples, key=lambda level: level.samples_before) - 1]
        return level.steps_before + ceil_div(samples - level.samples_before, level.batch_size)


@cache  # RunConfig.batch_ramp builds it at each use, several times per step
def make_batch_ramp(first: int, increment: int, last: int, tokens: int, sequence_length: int) -> BatchRamp:
    """Return the ramp from `first` to `last` sequences in steps of `increment`, over `tokens` consumed tokens.

    Each size but the last is in force for an equal share of these tokens. Steps are whole, so a share may begin some
    sequences late.
    """
    # Equal shares: the batch grows evenly with the tokens. The report (§4.2) does not say how its batch grew.
    shares = ceil_div(last - first, increment)
    levels, steps, consumed = [], 0, 0
    for number in range(shares):
        size, end = first + number * increment, ceil_div((number + 1) * tokens, shares * sequence_length)
        taken = ceil_div(end - consumed, size)
        if taken > 0:  # else the last step of a larger share has jumped over this one
            levels.append(BatchSizeLevel(steps, consumed, size))
            steps, consumed = steps + taken, consumed + taken * size
    return BatchRamp((*levels, BatchSizeLevel(steps, consumed, last)))
