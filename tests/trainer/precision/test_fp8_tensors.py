"""Quantization against its NumPy definition, to the last bit."""

import numpy as np
import pytest
import torch
from torch import Tensor

from shoestring.comm import fp8 as wire
from shoestring.tests.reference import fp8
from shoestring.tests.trainer.precision.hard_numbers import numbers
from shoestring.trainer.precision.fp8_tensors import (
    RowwiseFp8Tensor,
    ScaleFormat,
    dequantize_rowwise,
    dequantize_weight,
    quantize_columnwise,
    quantize_rowwise,
    quantize_weight,
)

SHAPES = [(1, 1), (3, 127), (5, 128), (130, 129), (257, 300)]


def numpy_of(x: Tensor) -> np.ndarray:
    return x.to(torch.float64).numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scales", ScaleFormat)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiles_are_the_definition(shape: tuple[int, int], scales: ScaleFormat, dtype: torch.dtype) -> None:
    x = numbers(*shape, dtype)
    tiles = quantize_rowwise(x, scales)
    values, scale = fp8.quantize(numpy_of(x), 1, 128, scales is ScaleFormat.POWER_OF_TWO)
    assert np.array_equal(numpy_of(tiles.values_XD), values)
    assert np.array_equal(tiles.scales_XQ.numpy(), scale[:, ::128])
    assert np.array_equal(dequantize_rowwise(tiles, torch.float32).numpy(), fp8.dequantize((values, scale)))


@pytest.mark.parametrize("scales", ScaleFormat)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_are_the_definition(shape: tuple[int, int], scales: ScaleFormat) -> None:
    x = numbers(*shape)
    blocks = quantize_weight(x, scales)
    values, scale = fp8.quantize(numpy_of(x), 128, 128, scales is ScaleFormat.POWER_OF_TWO)
    assert np.array_equal(numpy_of(blocks.values_NK), values)
    assert np.array_equal(blocks.scales_PQ.numpy(), scale[::128, ::128])
    assert np.array_equal(dequantize_weight(blocks, torch.float32).numpy(), fp8.dequantize((values, scale)))
    of_transpose = quantize_weight(x.T.contiguous(), scales)
    assert torch.equal(of_transpose.values_NK.float(), blocks.transposed().values_NK.float())
    assert torch.equal(of_transpose.scales_PQ, blocks.transposed().scales_PQ)


def test_a_stack_of_weights_is_each_of_them() -> None:
    stack = torch.randn(3, 150, 200)
    blocks = quantize_weight(stack, ScaleFormat.FP32)
    for number, weight in enumerate(stack):
        alone = quantize_weight(weight, ScaleFormat.FP32)
        assert torch.equal(blocks.values_NK[number].float(), alone.values_NK.float())
        assert torch.equal(blocks.scales_PQ[number], alone.scales_PQ)


@pytest.mark.parametrize("rows", [(300,), (128, 256), (5, 0, 200, 128), (0, 0)], ids=str)
def test_columns_are_tiled_an_expert_at_a_time(rows: tuple[int, ...]) -> None:
    x = torch.randn(sum(rows), 140)
    columns = quantize_columnwise(x, rows, ScaleFormat.FP32)
    starts = np.cumsum([0, *columns.tiles_per_expert_L])
    for number, part in enumerate(x.split(rows)):
        tiles = slice(starts[number], starts[number + 1])
        values = numpy_of(columns.tiles.values_XD[:, tiles.start * 128 : tiles.stop * 128])
        assert values.shape == (140, -(-len(part) // 128) * 128)
        assert not values[:, len(part) :].any()
        expected, scale = fp8.quantize(numpy_of(part).T, 1, 128, power_of_two=False)
        assert np.array_equal(values[:, : len(part)], expected)
        assert np.array_equal(columns.tiles.scales_XQ[:, tiles].numpy(), scale[:, ::128])


def test_rows_that_crossed_in_fp8_are_the_tiles_of_the_first_product() -> None:
    x = numbers(60, 300, torch.bfloat16)[3:]
    values, exponents = wire.quantize(x)
    sent = quantize_rowwise(x, ScaleFormat.POWER_OF_TWO)
    assert torch.equal(sent.values_XD.float(), values.float())
    for dtype in (torch.bfloat16, torch.float32):
        received = wire.dequantize(values, exponents, dtype)
        again = quantize_rowwise(received, ScaleFormat.POWER_OF_TWO)
        # The scale may be half as large; the numbers are the same ones.
        assert torch.equal(dequantize_rowwise(again, torch.float32), received.float())


@pytest.mark.parametrize("scales", ScaleFormat)
@pytest.mark.parametrize("fault", [float("nan"), float("inf"), -float("inf")])
def test_a_fault_stays_a_fault_in_its_tile(fault: float, scales: ScaleFormat) -> None:
    x = torch.ones(2, 256)
    x[1, 3] = fault
    back = dequantize_rowwise(quantize_rowwise(x, scales), torch.float32)
    assert back[1, :128].isnan().all()
    assert torch.allclose(back[0], x[0])
    assert torch.allclose(back[1, 128:], x[1, 128:])
    assert dequantize_weight(quantize_weight(x, scales), torch.float32)[:, :128].isnan().all()


def test_no_rows() -> None:
    tiles = quantize_rowwise(torch.empty(0, 300), ScaleFormat.FP32)
    assert dequantize_rowwise(RowwiseFp8Tensor(tiles.values_XD, tiles.scales_XQ), torch.bfloat16).shape == (0, 300)
