"""The rows of benchmarks/bring_up.py that compare: each detects the errors it is meant to find."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from shoestring.benchmarks.rows import attention, compute, exact, fp8, training
from shoestring.benchmarks.rows.row import Figures, Machine, Wrong
from shoestring.comm.groups import Group
from shoestring.tests.tree import ROOT
from shoestring.trainer.model import experts
from shoestring.trainer.precision.fp8_tensors import ColumnwiseFp8Tensor, Fp8Weight, RowwiseFp8Tensor, ScaleFormat
from shoestring.trainer.precision.reference import ReferenceBackend

ALONE = Group((0,), None, 0, timedelta(seconds=1))
CPU = Machine(torch.device("cpu"), ALONE, ALONE, ALONE)


@dataclass(frozen=True)
class SlightlyOff(ReferenceBackend):
    """One value of each quantized tensor is the next larger number; products are off by 2 %."""

    def quantize_rowwise(self, x_XD: Tensor, scales: ScaleFormat) -> RowwiseFp8Tensor:
        return _off(super().quantize_rowwise(x_XD, scales))

    def quantize_columnwise(self, x_RD: Tensor, rows_L: tuple[int, ...], scales: ScaleFormat) -> ColumnwiseFp8Tensor:
        made = super().quantize_columnwise(x_RD, rows_L, scales)
        return ColumnwiseFp8Tensor(_off(made.tiles), made.tiles_per_expert_L)

    def quantize_weight(self, weight: Tensor, scales: ScaleFormat) -> Fp8Weight:
        made = super().quantize_weight(weight, scales)
        return Fp8Weight(_one_off(made.values_NK), made.scales_PQ)

    def grouped_gemm(
        self, x: RowwiseFp8Tensor, weight: Fp8Weight, rows_L: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        return super().grouped_gemm(x, weight, rows_L, dtype) * 1.02

    def accumulate_grouped_wgrad(self, grad: ColumnwiseFp8Tensor, x: ColumnwiseFp8Tensor, sum_LNK: Tensor) -> None:
        sum_LNK += self.grouped_wgrad_gemm(grad, x) * 1.02


def _off(tiles: RowwiseFp8Tensor) -> RowwiseFp8Tensor:
    return RowwiseFp8Tensor(_one_off(tiles.values_XD), tiles.scales_XQ)


def _one_off(values: Tensor) -> Tensor:
    bits = values.clone().view(torch.uint8)
    bits[..., -1, -1] ^= 1
    return bits.view(torch.float8_e4m3fn)


@pytest.mark.parametrize("kernel", fp8.KERNELS, ids=lambda kernel: kernel.name)
def test_a_kernel_is_compared_with_the_reference(kernel: fp8.Kernel) -> None:
    assert set(fp8.compare(kernel, ReferenceBackend(), CPU.device).values()) == {0.0}
    with pytest.raises(Wrong, match=r"differ from the reference's|the error of"):
        fp8.compare(kernel, SlightlyOff(), CPU.device)


def test_every_kernel_has_a_row() -> None:
    source = (ROOT / "trainer" / "precision" / "kernels.py").read_text()
    kernels = [line.split("(")[0][4:] for line in source.splitlines() if line.startswith("def ")]
    helpers = {"output_block_index"}
    assert {name for name in kernels if not name.startswith("_")} - helpers == {kernel.name for kernel in fp8.KERNELS}


def test_a_number_that_is_another_is_seen() -> None:
    """NaN equals NaN, and nothing else."""
    nan = float("nan")
    exact._same("numbers", torch.tensor([1.0, nan]), torch.tensor([1.0, nan]))
    with pytest.raises(Wrong, match=r"1 of 2 numbers differ, first at \(1,\): nan, not 2.0"):
        exact._same("numbers", torch.tensor([1.0, nan]), torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize(
    "row", [exact.token_layout, exact.router, exact.e4m3_cast, exact.tiles_on_the_wire, exact.e5m6]
)
def test_a_cpu_is_as_a_cpu(row: Callable[[Machine], Figures]) -> None:
    assert row(CPU)


def test_attention_that_is_a_little_off_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scale is 5 % wrong."""
    assert attention.attention("auto", CPU)["backend"] == "blocks"
    monkeypatch.setattr(attention, "SCALE", 1.05 * attention.SCALE)
    plain = attention._plain
    monkeypatch.setattr(attention, "_plain", lambda *inputs: plain(inputs[0] / 1.05, *inputs[1:]))
    with pytest.raises(Wrong, match="the error of"):
        attention.attention("auto", CPU)


def test_experts_that_add_other_gradients_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """`accumulate_grouped_wgrad` is called only by training's own backward."""
    assert compute.grouped_empty(CPU)
    monkeypatch.setattr(experts, "accumulate_grouped_wgrad", lambda weight, grad, x, rows: None)
    with pytest.raises(Wrong, match="weight gradient in FP32"):
        compute.grouped_empty(CPU)


def test_a_step_that_is_off_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference takes a step without multi-token prediction."""
    other = replace(training.SETTINGS, mtp_loss_scaling_factor=0.0)
    settings = iter((other, other))
    step = training._Trainer.step

    def first_other(trainer: training._Trainer) -> tuple[float, float]:
        with patch.object(training, "SETTINGS", next(settings, training.SETTINGS)):
            return step(trainer)

    monkeypatch.setattr(training._Trainer, "step", first_other)
    with pytest.raises(Wrong, match="gradient norm of step 0"):
        training.training_step(CPU)


def test_hard_numbers_are_hard() -> None:
    x = exact.hard_numbers(10, 256)
    assert not x[0, :128].any()
    assert x[1:3].isfinite().logical_not().sum() == 2
    assert (x[3:9].abs() < 2**-30).any()
    assert (x[3:9].abs() > 2**15).any()
