"""The quantizer: its stated error bound, the smallest power of two for each tile, and NaN and infinity that stay."""

import pytest
import torch

from shoestring.comm.fp8 import TILE_WIDTH, dequantize, quantize, tiles_per_row


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, TILE_WIDTH - 1, TILE_WIDTH, 3 * TILE_WIDTH + 5])
def test_error_is_within_the_stated_bound(width: int, dtype: torch.dtype) -> None:
    # Eight decades in one tile: the small ones fall below E4M3's smallest normal number.
    x_XD = (torch.randn(64, width) * 10 ** torch.empty(64, width).uniform_(-6, 2)).to(dtype)
    values_XD, exponents_XQ = quantize(x_XD)
    assert values_XD.dtype == torch.float8_e4m3fn
    assert exponents_XQ.shape == (64, tiles_per_row(width))
    error_XD = (dequantize(values_XD, exponents_XQ, torch.float64) - x_XD.double()).abs()
    for tile in range(tiles_per_row(width)):
        columns = slice(tile * TILE_WIDTH, (tile + 1) * TILE_WIDTH)
        x_XI = x_XD[:, columns].double().abs()
        bound_XI = torch.maximum(x_XI / 16, x_XI.amax(dim=1, keepdim=True) / 2**17)
        assert (error_XD[:, columns] <= bound_XI).all()


@pytest.mark.parametrize("largest", [448.0, 448.0 * 2**-7, 448.0 * 2**20, 225.0, 1.0])
def test_the_scale_is_the_smallest_power_of_two_that_fits(largest: float) -> None:
    _, exponents_XQ = quantize(torch.tensor([[largest, -largest / 3]]))
    scale = 2.0 ** (int(exponents_XQ) - 127)
    assert largest / scale <= 448 < 2 * largest / scale
    _, above_XQ = quantize(torch.tensor([[largest * 1.001]]))
    assert int(above_XQ) - int(exponents_XQ) == int(largest / scale == 448)


def test_powers_of_two_and_zeros_are_exact() -> None:
    x_XD = torch.tensor([[0.0, 1.0, -0.5, 2.0**-8, 1.75]])
    assert torch.equal(dequantize(*quantize(x_XD), torch.float32), x_XD)
    assert torch.equal(dequantize(*quantize(torch.zeros(2, 200)), torch.float32), torch.zeros(2, 200))


@pytest.mark.parametrize("fault", [float("nan"), float("inf"), -float("inf")])
def test_a_fault_stays_a_fault_in_its_tile_alone(fault: float) -> None:
    x_XD = torch.ones(2, 2 * TILE_WIDTH)
    x_XD[1, 3] = fault
    back_XD = dequantize(*quantize(x_XD), torch.bfloat16)
    assert back_XD[1, :TILE_WIDTH].isnan().all()
    assert (back_XD[0] == 1).all()
    assert (back_XD[1, TILE_WIDTH:] == 1).all()


def test_the_smallest_numbers_do_not_overflow_on_the_way() -> None:
    x_XD = torch.full((1, 3), 2.0**-140)
    assert dequantize(*quantize(x_XD), torch.float32).abs().max() <= 2.0**-130


def test_no_rows() -> None:
    values_XD, exponents_XQ = quantize(torch.empty(0, 300))
    assert dequantize(values_XD, exponents_XQ, torch.float32).shape == (0, 300)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("exponent", [-100, -8, 0, 1, 40, 100])
def test_what_comes_back_is_the_number_times_its_scale(dtype: torch.dtype, exponent: int) -> None:
    """Small and large scales take different code paths on a CPU; the values include every E4M3 number."""
    values_XD = torch.arange(256, dtype=torch.int64).to(torch.uint8).view(torch.float8_e4m3fn).float()
    values_XD = values_XD.nan_to_num(1.0).view(2, 128).to(torch.float8_e4m3fn)
    exponents_XQ = torch.full((2, 1), 127 + exponent, dtype=torch.uint8)
    expected = (values_XD.double() * 2.0**exponent).to(dtype)
    assert torch.equal(dequantize(values_XD, exponents_XQ, dtype), expected)
