"""The benchmark of a layer: its phases are those of training, and launches are counted by phase."""

from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.autograd import DeviceType

from shoestring.benchmarks import v3_layer
from shoestring.trainer.precision.fp8 import Fp8LinearOps
from shoestring.trainer.precision.fp8_tensors import Fp8Weight, RowwiseFp8Tensor, ScaleFormat
from shoestring.trainer.precision.reference import ReferenceBackend


@dataclass(frozen=True)
class Counting(ReferenceBackend):
    """A module that counts its calls."""

    times: Counter[str] = field(default_factory=Counter)

    def quantize_weight(self, weight: Tensor, scales: ScaleFormat) -> Fp8Weight:
        self.times["blocks"] += 1
        return super().quantize_weight(weight, scales)

    def gemm(self, x: RowwiseFp8Tensor, weight: Fp8Weight, dtype: torch.dtype) -> Tensor:
        self.times["multiply"] += 1
        return super().gemm(x, weight, dtype)


def test_the_layer_is_run_phase_by_phase_as_in_training() -> None:
    setting, device, counting = v3_layer.small(), torch.device("cpu"), Counting()
    model = v3_layer.build(setting, "reference", device)
    model.enable_fp8(Fp8LinearOps(counting))
    before = {name: weight.grad for name, weight in model.named_parameters()}
    with model.cache_fp8_weights():
        for _ in range(2):
            counting.times["multiply"] = 0
            seconds = v3_layer.layer_seconds(model, setting, device)
    assert list(seconds) == list(v3_layer.TRACE_US)
    assert counting.times["blocks"] == 5 + 2 + 2  # attention, shared expert, routed ones: each weight once
    assert counting.times["multiply"] == 2 * (5 + 2 + 2 * 4) + 2  # the last: up-projections of the latents again
    for name, weight in model.named_parameters():
        assert weight.dtype == (torch.float32 if name in model.fp32_parameter_names() else torch.bfloat16)
        assert weight.grad is before[name]
        assert weight.grad is not None
        assert weight.grad.dtype == torch.float32
        assert weight.grad.any()
    assert sum(v3_layer.TRACE_US.values()) == 31072  # what the trace spends on computing a layer pair


def test_launches_are_counted_by_the_phase_that_they_begin_in() -> None:
    """Launches count on any host thread. GPU events have the same names and do not count."""

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
