"""How many sequences each optimizer step takes: the batch ramp (report §4.2: from 3,072 to 15,360 over 469 B tokens).

A step's size follows from what the steps before it have consumed, so from its number alone: neither a restart nor
another grid of ranks changes which samples it takes.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class BatchSizeLevel:
    """Steps of one size that follow each other."""

    steps_before: int
    """Taken before the first of them."""
    samples_before: int
    """Consumed before it."""
    batch_size: int
    """Sequences of each."""


@dataclass(frozen=True)
class BatchRamp:
    """The sizes of all steps of a run. Steps count from 1; `samples` are sequences."""

    levels: tuple[BatchSizeLevel, ...]
    """Ascending; the last has no end."""

    @staticmethod
    def constant(size: int) -> BatchRamp:
        """The same from the first step on."""
        return BatchRamp((BatchSizeLevel(0, 0, size),))

    def batch_size(self, step: int) -> int:
        """Sequences of step number `step`."""
        return self.levels[bisect_left(self.levels, step, key=lambda level: level.steps_before) - 1].batch_size

    def consumed_samples(self, steps: int) -> int:
        """Samples that the first `steps` steps take."""
        level = self.levels[bisect_right(self.levels, steps, key=lambda level: level.steps_before) - 1]
        return level.samples_before + (steps - level.steps_before) * level.batch_size

    def steps_for_samples(self, samples: int) -> int:
        """Steps until at least so many samples are consumed."""
        if samples <= 0:
            return 0
        level = self.levels[bisect_left(self.levels, samples, key=lambda level: level.samples_before) - 1]
        return level.steps_before + _up(samples - level.samples_before, level.batch_size)


@cache
def make_batch_ramp(first: int, increment: int, last: int, tokens: int, sequence_length: int) -> BatchRamp:
    """From `first` sequences to `last`, by `increment` at a time, over `tokens` consumed tokens.

    Each size but the last is in force for an equal share of these tokens, so the batch grows evenly with them; the
    report does not say how its batch grew. Steps are whole, so a share may begin some sequences late.
    """
    shares = _up(last - first, increment)
    levels, steps, consumed = [], 0, 0
    for number in range(shares):
        size, end = first + number * increment, _up((number + 1) * tokens, shares * sequence_length)
        taken = _up(end - consumed, size)
        if taken > 0:  # else the last step of a larger share has jumped over this one
            levels.append(BatchSizeLevel(steps, consumed, size))
            steps, consumed = steps + taken, consumed + taken * size
    return BatchRamp((*levels, BatchSizeLevel(steps, consumed, last)))


def _up(number: int, of: int) -> int:
    """`number` / `of`, rounded up."""
    return -(-number // of)
