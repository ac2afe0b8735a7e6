"""Which source each sample of a run comes from: shares by samples, exact in every block, changing at token counts.

All samples have S tokens, so shares of samples are shares of tokens. A block of samples takes from each source its
share, rounded so that the sums over all blocks stay within one sample of it, in an order shuffled by the seed. All
of it is computed from the number of the sample alone, in whole numbers: no process and no restart changes it.

Shapes: N samples of a range.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from ...comm.units import ceil_div
from .document_random import document_key
from .samples import permute_indices
from .shards import Int64Array

BLOCK = 4096
"""Samples within which each source has its share."""
MAX_SOURCES = 64
"""Above it the source of the largest share could lack samples in a block to even out the rounding of the others."""


@dataclass(frozen=True)
class MixturePhase:
    """Shares of the sources from one sample on."""

    first: int
    """Number of the phase's first sample."""
    weights: tuple[int, ...]
    """Share of each source in whole numbers of any sum."""


@dataclass(frozen=True)
class SampleMixture:
    """Sequence of sources over the samples of a run."""

    seed: int
    phases: tuple[MixturePhase, ...]

    @staticmethod
    def from_weights(seed: int, weights: Sequence[Mapping[int, float]], sequence_length: int) -> "SampleMixture":
        """Build from each source's weights by the number of tokens at which they begin; all have one for 0 tokens.

        A weight changes with the first sample that begins at or after its number of tokens.
        """
        phases = []
        for tokens in sorted({tokens for each in weights for tokens in each}):
            now = [each[max(begin for begin in each if begin <= tokens)] for each in weights]
            phases.append(MixturePhase(ceil_div(tokens, sequence_length), _whole_numbers(now)))
        return SampleMixture(seed, tuple(phases))

    def assign(self, first: int, count: int) -> tuple[Int64Array, Int64Array]:
        """Return sources of samples `first` to `first + count` (excluded), and numbers in them: int64 [N] each."""
        sources, numbers = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
        last = first + count
        for place, phase in enumerate(self.phases):
            end = self.phases[place + 1].first if place + 1 < len(self.phases) else last
            start, stop = max(first, phase.first), min(last, end)
            for block in range(
                (start - phase.first) // BLOCK, -(-(stop - phase.first) // BLOCK) if start < stop else 0
            ):
                source_N, number_N = _block(self, place, block)
                begin = phase.first + block * BLOCK
                part = slice(max(start - begin, 0), min(stop - begin, BLOCK))
                sources.append(source_N[part])
                numbers.append(number_N[part])
        return np.concatenate(sources), np.concatenate(numbers)

    def consumed(self, samples: int) -> tuple[int, ...]:
        """Return how many samples of each source are among the first `samples` of the run."""
        place = max((place for place, phase in enumerate(self.phases) if phase.first <= samples), default=0)
        phase, before = self.phases[place], _consumed_before(self, place)
        block, rest = divmod(samples - phase.first, BLOCK)
        whole = _counts(phase.weights, block)
        source_N, _ = _block(self, place, block)
        partial = np.bincount(source_N[:rest], minlength=len(whole))
        return tuple(b + w + int(p) for b, w, p in zip(before, whole, partial, strict=True))


def _whole_numbers(weights: Sequence[float]) -> tuple[int, ...]:
    """Return whole numbers in the proportions of `weights` as they are written in decimal."""
    exact = [Fraction(repr(float(weight))) for weight in weights]
    scale = np.lcm.reduce([each.denominator for each in exact], dtype=object)
    return tuple(int(each * scale) for each in exact)


def _counts(weights: Sequence[int], blocks: int) -> list[int]:
    """Return the samples of each source in the first `blocks` blocks of a phase."""
    total, samples = sum(weights), blocks * BLOCK
    counts = [samples * weight // total for weight in weights]
    largest = max(range(len(weights)), key=lambda source: weights[source])
    counts[largest] += samples - sum(counts)
    return counts


@lru_cache(maxsize=256)
def _consumed_before(mixture: SampleMixture, place: int) -> tuple[int, ...]:
    """Return the samples of each source before phase number `place`."""
    if place == 0:
        return (0,) * len(mixture.phases[0].weights)
    return SampleMixture(mixture.seed, mixture.phases[:place]).consumed(mixture.phases[place].first)


@lru_cache(maxsize=16)
def _block(mixture: SampleMixture, place: int, block: int) -> tuple[Int64Array, Int64Array]:
    """Return the sources of a block of phase number `place`, and the numbers of its samples in them."""
    weights, before = mixture.phases[place].weights, _consumed_before(mixture, place)
    counts, after = _counts(weights, block), _counts(weights, block + 1)
    in_order = np.repeat(np.arange(len(weights)), np.subtract(after, counts))
    key = np.full(BLOCK, document_key(mixture.seed, "mixture", str(place), block), dtype=np.uint64)
    source_N = in_order[permute_indices(np.arange(BLOCK, dtype=np.uint64), BLOCK, key).astype(np.int64)]
    number_N = np.empty(BLOCK, dtype=np.int64)
    for source, (done, count) in enumerate(zip(before, counts, strict=True)):
        is_of = source_N == source
        number_N[is_of] = done + count + np.arange(is_of.sum())
    return source_N, number_N
