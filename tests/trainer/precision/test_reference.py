"""Products of the reference backend against their NumPy definition, and the sums of Hopper's accumulator."""

import numpy as np
import pytest
import torch
from torch import Tensor

from shoestring.tests.reference import fp8
from shoestring.tests.trainer.precision.against_reference import check_products
from shoestring.trainer.precision.fp8_tensors import ScaleFormat, quantize_columnwise, quantize_rowwise, quantize_weight
from shoestring.trainer.precision.reference import ReferenceBackend, emulate_hopper_gemm, exact_gemm

ROWS = (150, 0, 128, 7)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def tiles(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    return fp8.quantize(x.numpy(), 1, 128, power_of_two=False)


def blocks(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    return fp8.quantize(x.numpy(), 128, 128, power_of_two=False)


@pytest.mark.parametrize(("rows", "width", "out"), [(1, 1, 1), (70, 128, 256), (130, 300, 150)])
def test_products_are_the_definition(rows: int, width: int, out: int) -> None:
    x_RK, w_NK = normal(rows, width), normal(out, width)
    ours = ReferenceBackend().gemm(
        quantize_rowwise(x_RK, ScaleFormat.FP32), quantize_weight(w_NK, ScaleFormat.FP32), torch.float32
    )
    assert np.array_equal(ours.numpy(), fp8.product(tiles(x_RK), blocks(w_NK)))


def test_input_gradients_use_the_same_blocks_the_other_way_round() -> None:
    grad_RN, w_NK = normal(70, 300), normal(300, 150)
    transposed = quantize_weight(w_NK, ScaleFormat.FP32).transposed()
    ours = ReferenceBackend().gemm(quantize_rowwise(grad_RN, ScaleFormat.FP32), transposed, torch.float32)
    values, scales = blocks(w_NK)
    assert np.array_equal(ours.numpy(), fp8.product(tiles(grad_RN), (values.T, scales.T)))


def test_grouped_products_are_those_of_each_expert() -> None:
    x_RK, w_LNK, grad_RN = normal(sum(ROWS), 140), normal(4, 200, 140), normal(sum(ROWS), 200)
    backend = ReferenceBackend()
    x, grad = (quantize_columnwise(part, ROWS, ScaleFormat.FP32) for part in (x_RK, grad_RN))
    ours_RN = backend.grouped_gemm(
        quantize_rowwise(x_RK, ScaleFormat.FP32), quantize_weight(w_LNK, ScaleFormat.FP32), ROWS, torch.float32
    )
    grads_LNK = backend.grouped_wgrad_gemm(grad, x)
    assert grads_LNK.dtype == torch.float32
    parts = zip(x_RK.split(ROWS), w_LNK, grad_RN.split(ROWS), ours_RN.split(ROWS), grads_LNK, strict=True)
    for x_part, weight, grad_part, ours, ours_grad in parts:
        assert np.array_equal(ours.numpy(), fp8.product(tiles(x_part), blocks(weight)))
        expected = fp8.product(tiles(grad_part.T.contiguous()), tiles(x_part.T.contiguous()))
        assert np.array_equal(ours_grad.numpy(), expected)


def uniform(rows: int, width: int) -> Tensor:
    return torch.rand(rows, width, generator=torch.Generator().manual_seed(rows)).to(torch.float8_e4m3fn).double()


def test_exact_sums_do_not_depend_on_the_order() -> None:
    a, b = uniform(8, 4096), uniform(9, 4096)
    order = torch.randperm(4096)
    assert torch.equal(exact_gemm(a, b), exact_gemm(a[:, order], b[:, order]))


def test_thirteen_bits_are_kept_of_an_instruction() -> None:
    one = torch.ones(1, 32, dtype=torch.float64)
    small = one * 2.0**-9
    a = torch.cat((one[:, :1], small[:, 1:]), dim=1)
    # 1 · 1, and 31 terms of 2^-9 or of 2^-18: with a sum near 1 the last bit that is kept is 2^-13.
    assert float(emulate_hopper_gemm(a, torch.cat((one[:, :1], one[:, 1:]), dim=1))) == 1 + 31 * 2.0**-9
    assert float(emulate_hopper_gemm(a, torch.cat((one[:, :1], small[:, 1:]), dim=1))) == 1
    assert float(emulate_hopper_gemm(small, small)) == 32 * 2.0**-18  # without a larger term


def test_on_a_gpu_products_may_be_off_by_what_its_accumulator_loses() -> None:
    """The allowed error is larger than elsewhere, and smaller than that of sums in BF16."""
    hopper, cpu = ReferenceBackend(emulate_hopper_gemm), torch.device("cpu")
    with pytest.raises(AssertionError, match="above"):
        check_products(hopper, cpu)
    with pytest.raises(AssertionError, match="above"):
        check_products(ReferenceBackend(lambda a, b: exact_gemm(a, b).bfloat16().float()), cpu, hopper)


def test_promotion_takes_most_of_the_error_away() -> None:
    a, b = uniform(16, 4096), uniform(17, 4096)
    truth = exact_gemm(a, b)
    error = [float((emulate_hopper_gemm(a, b, every) - truth).abs().max() / truth.abs().max()) for every in (None, 128)]
    assert error[0] > 10 * error[1] > 0
