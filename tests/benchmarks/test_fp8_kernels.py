"""The benchmarks of FP8 on a machine without a GPU: they work, and say that there is nothing to measure."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType

from shoestring.benchmarks import fp8_accumulation, fp8_kernels, v3_layer
from shoestring.trainer.precision.fp8 import Fp8
from shoestring.trainer.precision.reference import Reference
from shoestring.trainer.precision.tiles import Blocks, Scales, Tiles


@dataclass(frozen=True)
class Counting(Reference):
    """Counts what it does."""

    times: Counter[str] = field(default_factory=Counter)

    def blocks(self, weight: Tensor, scales: Scales) -> Blocks:
        self.times["blocks"] += 1
        return super().blocks(weight, scales)

    def multiply(self, x: Tiles, weight: Blocks, dtype: torch.dtype) -> Tensor:
        self.times["multiply"] += 1
        return super().multiply(x, weight, dtype)


def test_the_layer_is_run_phase_by_phase_as_in_training() -> None:
    setting, device, counting = v3_layer.small(), torch.device("cpu"), Counting()
    model = v3_layer.build(setting, "reference", device)
    model.use_fp8(Fp8(counting))
    before = {name: weight.grad for name, weight in model.named_parameters()}
    with model.weights_unchanged():
        for _ in range(2):
            counting.times["multiply"] = 0
            seconds = v3_layer.layer_seconds(model, setting, device)
    assert list(seconds) == list(v3_layer.TRACE_US)
    assert counting.times["blocks"] == 5 + 2 + 2  # attention, shared expert, routed ones: each weight once
    assert counting.times["multiply"] == 2 * (5 + 2 + 2 * 4) + 2  # the last: up-projections of the latents again
    for name, weight in model.named_parameters():
        assert weight.dtype == (torch.float32 if name in model.wide_parameter_names() else torch.bfloat16)
        assert weight.grad is before[name]
        assert weight.grad is not None
        assert weight.grad.dtype == torch.float32
        assert weight.grad.any()
    assert sum(v3_layer.TRACE_US.values()) == 31072  # what the trace spends on computing a layer pair


def test_launches_are_counted_by_the_phase_that_they_begin_in() -> None:
    """On any thread of the host; what the GPU does has the same names and is left out."""

    def event(name: str, start: float, end: float, device: DeviceType = DeviceType.CPU) -> SimpleNamespace:
        return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), device_type=device)

    events = [
        event("attn(F)", 0, 10),
        event("attn(F)", 2, 90, DeviceType.CUDA),
        event("mlp(F)", 20, 30),
        event("cudaLaunchKernel", 1, 2),
        event("cuLaunchKernelEx", 9, 12),
        event("cudaMemcpyAsync", 21, 22),
        event("cudaLaunchKernel", 15, 16),  # between the phases
        event("cudaStreamSynchronize", 3, 4),
        event("aten::mm", 3, 4),
    ]
    assert v3_layer.count_launches(events) == {"attn(F)": 2, "mlp(F)": 1}
    setting, device = v3_layer.small(), torch.device("cpu")
    counts = v3_layer.launches(v3_layer.build(setting, "reference", device), setting, device)
    assert counts == dict.fromkeys(v3_layer.TRACE_US, 0)  # every phase is found, and a CPU launches nothing


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_they_say_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark"])
    for benchmark in (fp8_kernels, v3_layer):
        benchmark.main()
        assert "nothing to measure here" in capsys.readouterr().out


def test_what_is_asked_of_our_kernels_is_the_traces_rate_on_all_processors() -> None:
    shapes = {shape.name: shape for shape in fp8_kernels.SHAPES}
    assert shapes["o_proj fwd"].asked(132) == pytest.approx(1068 * 132 / 112)
    assert shapes["o_proj dgrad"].asked(132) == pytest.approx(1038 * 132 / 112)
    assert shapes["o_proj wgrad"].asked(132) == pytest.approx(0.9 * 642 * 132 / 112)
    row = fp8_kernels.Row("o_proj fwd", trace=1068, triton=1258.0, torch=2000.0, bf16=700.0, error=1e-3, asked=1258.7)
    assert fp8_kernels.verdicts(row) == ["BELOW"]  # ours alone count
    assert fp8_kernels.verdicts(replace(row, triton=1259.0)) == ["reached"]
    assert fp8_kernels.verdicts(replace(row, triton=1259.0, error=0.02)) == ["reached", "WRONG"]
    assert fp8_kernels.verdicts(replace(row, triton=None, error=float("nan"))) == ["WRONG"]


class Event:
    """Of a GPU that works only when the host waits for it, or, `awake`, at once; a millisecond an event."""

    clock, awake = 0.0, 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = 0.0

    def record(self) -> None:
        Event.clock += 1
        self.at = Event.clock

    def query(self) -> bool:
        return Event.awake > 0

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


@pytest.mark.parametrize("late", [0, 2])
def test_the_gpu_sleeps_until_all_repetitions_are_queued(monkeypatch: pytest.MonkeyPatch, late: int) -> None:
    slept: list[int] = []

    def sleep(cycles: int) -> None:
        slept.append(cycles)
        Event.awake = late + 1 - len(slept)

    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: empty(8))
    times = fp8_kernels.milliseconds(lambda: torch.zeros(1))
    assert times == [1.0] * fp8_kernels.REPETITIONS
    assert slept == [2**26 * 2**doubled for doubled in range(late + 1)]


def test_promotion_is_worth_ten_times_at_the_reports_length() -> None:
    assert fp8_accumulation.relative_error(4096, None) > 10 * fp8_accumulation.relative_error(4096, 128)
