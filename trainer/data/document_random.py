"""Random numbers of a document: a pure function of the seed, its file and its place there.

Integer arithmetic only, so the numbers are the same on every machine and with every library version.

Shapes: N numbers.
"""

import hashlib

import numpy as np
import numpy.typing as npt

UInt64Array = npt.NDArray[np.uint64]

GOLDEN_RATIO = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio: the step of SplitMix64's counter."""


def splitmix64(values: UInt64Array) -> UInt64Array:
    """Mix the bits of each value by the finalizer of SplitMix64 (Steele, Lea, Flood 2014), a bijection."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def document_key(seed: int, purpose: str, file: str, place: int) -> int:
    """Return 64 bits that look random, for one purpose of the document at `place` of `file`."""
    text = f"{seed}\0{purpose}\0{place}\0{file}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def uniform_fraction(key: int) -> float:
    """Return the number in [0, 1) that `key` stands for."""
    return (key >> 11) * 2.0**-53


def uniform_fractions(key: int, count: int) -> npt.NDArray[np.float64]:
    """Return numbers in [0, 1) drawn with `key`: float64 [N]."""
    counter_N = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN_RATIO) + np.uint64(key)
    return (splitmix64(counter_N) >> np.uint64(11)).astype(np.float64) * 2.0**-53
