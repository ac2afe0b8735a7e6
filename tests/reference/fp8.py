"""FP8 from its definition, in NumPy: numbers by looking through all there are, tiles one at a time, sums in FP64.

The reference of `trainer/precision`, with which it shares no code. A matrix is quantized in tiles of `high` x `wide`,
from its upper left corner; a product's sum is exact within 128 neighbors, rounded to FP32, scaled, and added in FP32
from left to right (report §3.3.2).

Letters: X, Y rows of two factors, K what is summed over.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
TILE = 128


def minifloat(exponent_bits: int, mantissa_bits: int, largest: float) -> Array:
    """Return every number that is not negative up to `largest`, ascending: the even places have an even last bit."""
    bias = 2 ** (exponent_bits - 1) - 1
    fractions = np.arange(2**mantissa_bits) / 2**mantissa_bits
    normal = [2.0 ** (e - bias) * (1 + fractions) for e in range(1, 2**exponent_bits)]
    numbers = np.concatenate([fractions * 2.0 ** (1 - bias), *normal])
    return numbers[numbers <= largest]


E4M3 = minifloat(4, 3, 448.0)
E5M6 = minifloat(5, 6, 65024.0)


def nearest(x: Array, numbers: Array) -> Array:
    """Return the nearest of `numbers`, with the sign of x; a tie goes to the one with an even last bit."""
    size = np.abs(x.astype(np.float64))
    above = np.clip(np.searchsorted(numbers, size), 1, len(numbers) - 1)
    to_below, to_above = size - numbers[above - 1], numbers[above] - size
    up = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    return np.copysign(np.where(up, numbers[above], numbers[above - 1]), x)


def quantize(x: Array, high: int, wide: int, power_of_two: bool, numbers: Array = E4M3) -> tuple[Array, Array]:
    """Return the numbers, in FP64, and the scale of each, in FP32, both in the shape of `x`."""
    x = x.astype(np.float32)
    values, scales = np.zeros(x.shape, np.float64), np.ones(x.shape, np.float32)
    for top in range(0, x.shape[0], high):
        for left in range(0, x.shape[1], wide):
            tile = (slice(top, top + high), slice(left, left + wide))
            scale = _scale(np.abs(x[tile]).max(), numbers[-1], power_of_two)
            values[tile], scales[tile] = nearest(x[tile] / scale, numbers), scale
    return values, scales


def _scale(largest: np.float32, limit: float, power_of_two: bool) -> np.float32:
    if not power_of_two:
        return max(np.float32(largest / np.float32(limit)), np.float32(2.0**-126))
    scale = 2.0**-126
    while float(largest) / scale > limit:
        scale *= 2
    return np.float32(scale)


def dequantize(quantized: tuple[Array, Array]) -> Array:
    """Return the numbers in FP32."""
    values, scales = quantized
    return values.astype(np.float32) * scales


def product(a: tuple[Array, Array], b: tuple[Array, Array]) -> Array:
    """Return a bᵀ, FP32 [X, Y]; every scale holds for 128 neighbors of a row."""
    total = np.zeros((len(a[0]), len(b[0])), np.float32)
    for start in range(0, a[0].shape[1], TILE):
        part = slice(start, start + TILE)
        exact = a[0][:, part] @ b[0][:, part].T
        total += exact.astype(np.float32) * a[1][:, start, None] * b[1][None, :, start]
    return total
