"""A shuffle without a table: each position of a permuted row is computed when it is asked for.

A run of trillions of tokens has billions of samples, whose permutation would fill gigabytes on every rank. A Feistel
network is a bijection of 2^(2h) numbers for any round function; numbers outside the wanted size are sent through
again until they fall inside ("cycle walking", Black and Rogaway 2002), at most four times on average.
Only integer arithmetic is used, so the order is the same on every machine and with every version of any library.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

UInt64Array = npt.NDArray[np.uint64]

_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15
_WORD = 2**64 - 1


def permute(positions: UInt64Array, size: int, keys: UInt64Array) -> UInt64Array:
    """Where each of `positions` (less than `size`) goes in the permutation of `size` numbers that its key selects."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    result = _feistel(positions, half, keys)
    while (outside := result >= size).any():
        result[outside] = _feistel(result[outside], half, keys[outside])
    return result


def mix(values: UInt64Array) -> UInt64Array:
    """Scatter the bits of each value: the finaliser of SplitMix64 (Steele, Lea, Flood 2014), a bijection."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _feistel(values: UInt64Array, half: int, keys: UInt64Array) -> UInt64Array:
    """A keyed bijection of the numbers of 2 * `half` bits."""
    mask = np.uint64(2**half - 1)
    left, right = values >> np.uint64(half), values & mask
    for number in range(1, _ROUNDS + 1):
        round_keys = mix(keys + np.uint64(number * _GOLDEN & _WORD))
        left, right = right, left ^ (mix(right ^ round_keys) & mask)
    return (left << np.uint64(half)) | right
