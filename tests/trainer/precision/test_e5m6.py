"""Twelve-bit numbers against their definition."""

import numpy as np
import pytest
import torch
from torch import Tensor

from shoestring.tests.reference import fp8
from shoestring.tests.trainer.precision.hard_numbers import numbers
from shoestring.trainer.precision.e5m6 import pack_e5m6, unpack_e5m6

SHAPES = [(1, 1), (3, 127), (5, 128), (130, 129), (257, 300)]


def numpy_of(x: Tensor) -> np.ndarray:
    return x.to(torch.float64).numpy()


@pytest.mark.parametrize("shape", [*SHAPES, (2, 2)], ids=str)
def test_e5m6_is_the_definition_and_takes_three_bytes_for_two(shape: tuple[int, int]) -> None:
    x = numbers(*shape)
    packed = pack_e5m6(x)
    expected = fp8.dequantize(fp8.quantize(numpy_of(x), 1, 128, power_of_two=True, numbers=fp8.E5M6))
    assert np.array_equal(unpack_e5m6(packed, torch.float32).numpy(), expected)
    assert packed.bytes_XB.shape == (shape[0], 3 * -(-shape[1] // 2))
    x[0, 0] = float("nan")
    assert unpack_e5m6(pack_e5m6(x), torch.float32)[0, :128].isnan().all()
