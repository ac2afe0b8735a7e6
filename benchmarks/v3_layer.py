"""One MoE layer of DeepSeek-V3 on a Hopper GPU, phase by phase, compared with DeepSeek's public training trace.

    python benchmarks/v3_layer.py [--provider auto] [--json benchmarks/results/v3_layer_h200.json]

One rank of 64 expert-parallel ranks: attention, router and shared expert on one sequence of 4096 tokens, four
routed experts on 8192 rows each. Nothing is sent: the rows are local. As in a training step, weights are BF16 and
already quantized to FP8, gradients are accumulated in FP32, and the backward recomputes the modules of the report.
The trace (deepseek-ai/profile-data, train.json) is of an H800 whose GEMMs had 112 of 132 SMs. Without such a GPU the
script prints why and exits with 0. Not yet run on hardware.
"""

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from shoestring.launch.planner.compute_time import MEASURED_MODEL
from shoestring.parallelism.weight_grad import DelayedWeightGradients
from shoestring.trainer.model.attention_backend import AttentionShape, GpuCapabilities, select_attention
from shoestring.trainer.model.config import ModelConfig
from shoestring.trainer.model.layer import LayerContext, MoELayer
from shoestring.trainer.model.model import Model, ModelShard
from shoestring.trainer.model.recompute import RecomputeModule, SelectiveRecompute
from shoestring.trainer.model.rope import build_rotary_embedding
from shoestring.trainer.precision.backend import choose_backend, open_backend, unavailable_reasons
from shoestring.trainer.precision.fp8 import Fp8LinearOps

TRACE_US = {"attn(F)": 4370, "mlp(F)": 4604, "mlp(B)": 5306, "mlp(W)": 5063, "attn(B)": 9341, "attn(W)": 2388}
LAUNCH = re.compile("cu(da)?(LaunchKernel|LaunchCooperativeKernel|Memcpy|Memset)")
"""Calls of CUDA's runtime and driver that queue work on a stream."""
RECOMPUTED = frozenset(
    {RecomputeModule.NORM, RecomputeModule.UP_PROJECTION, RecomputeModule.SWIGLU}
)  # recompute=deepseek_v3, as in the trace
V3 = replace(
    MEASURED_MODEL,
    vocab_size=256,
    num_hidden_layers=1,
    first_k_dense_replace=0,
    n_group=8,
    topk_group=4,
    num_nextn_predict_layers=0,
)


@dataclass(frozen=True)
class Setting:
    """Inputs of the layer."""

    config: ModelConfig
    expert_ranks: int
    tokens: int
    rows_per_expert: int


SETTING = Setting(V3, expert_ranks=64, tokens=4096, rows_per_expert=8192)


def build(setting: Setting, provider: str, device: torch.device) -> Model:
    """Build a model of random weights, BF16 but for norms and router, with FP32 gradients; only its layer is used."""
    with torch.device(device):
        model = Model(setting.config, ModelShard((0,), False, False, setting.expert_ranks))
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.006) if weight.ndim > 1 else weight.fill_(1.0)
    for _, router in model.routers():
        router.bias_E.zero_()
    wide = model.fp32_parameter_names()
    for name, weight in model.named_parameters():
        if name not in wide:
            weight.data = weight.data.to(torch.bfloat16)
        weight.grad_dtype = torch.float32
        weight.grad = torch.zeros_like(weight, dtype=torch.float32)
    model.enable_fp8(Fp8LinearOps(open_backend(provider, device)))
    if device.type == "cuda":
        config, dtype = setting.config, torch.bfloat16
        case = AttentionShape(
            1, config.num_attention_heads, setting.tokens, config.qk_head_dim, config.v_head_dim, dtype
        )
        model.set_attention(select_attention("auto", case, GpuCapabilities.detect()))
    return model


def layer_seconds(model: Model, setting: Setting, device: torch.device) -> dict[str, float]:
    """Run forward and backward of the layer in the order of the trace.

    The first run quantizes the weights, and later ones too unless the caller has declared them unchanged.
    """
    layer = model.layers["0"]
    assert isinstance(layer, MoELayer)
    seconds: dict[str, float] = {}
    shape = (1, setting.tokens, setting.config.hidden_size)
    local = setting.config.n_routed_experts // setting.expert_ranks
    rows_L = (setting.rows_per_expert,) * local

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    def timed(name: str, work: Callable[[], object]) -> None:
        _settle(device)
        began = time.perf_counter()
        with record_function(name):
            work()
        _settle(device)
        seconds[name] = time.perf_counter() - began

    x_BSD = normal(*shape).requires_grad_()
    rows_RD = normal(sum(rows_L), setting.config.hidden_size).requires_grad_()
    gates_R = torch.rand(sum(rows_L), device=device).requires_grad_()
    context = LayerContext(
        build_rotary_embedding(setting.config, setting.tokens, x_BSD),
        torch.ones(shape[:2], dtype=torch.bool, device=device),
    )
    attention, ffn, recompute = (
        DelayedWeightGradients(deferred=True),
        DelayedWeightGradients(deferred=True),
        SelectiveRecompute(RECOMPUTED),
    )
    made: dict[str, tuple[Tensor, ...]] = {}

    def attend() -> None:
        with attention.collect_from_forward(), recompute.enable():
            residual_BSD, normed_TD, routing = layer.attend_and_route(x_BSD, context)
        made["attn"] = (residual_BSD, normed_TD, routing.gates_TK)

    def mlp() -> None:
        normed_TD = made["attn"][1].detach().requires_grad_()
        with ffn.collect_from_forward(), recompute.enable():
            shared = () if layer.shared is None else (layer.shared(normed_TD),)
            made["mlp"] = (*shared, layer.experts(rows_RD, gates_R, rows_L))

    def backward(part: str) -> None:
        grads = [torch.randn_like(out) for out in made[part]]
        timed(f"{part}(B)", lambda: torch.autograd.backward(made[part], grads))

    timed("attn(F)", attend)
    timed("mlp(F)", mlp)
    backward("mlp")
    timed("mlp(W)", ffn.flush)
    backward("attn")
    timed("attn(W)", attention.flush)
    return seconds


def launches(model: Model, setting: Setting, device: torch.device) -> dict[str, int]:
    """Count the kernels, copies and fills that the host launches in each phase, with torch's profiler."""
    on_gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *on_gpu]) as profiler:
        layer_seconds(model, setting, device)
    return count_launches(profiler.events())


def count_launches(events: Iterable[Any]) -> dict[str, int]:
    """Count the launches among the profiler's events, by the phase during which they start, over all threads."""
    events = list(events)
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    phases = {event.name: event.time_range for event in on_host if event.name in TRACE_US}
    begins = [event.time_range.start for event in on_host if LAUNCH.match(event.name)]
    return {name: sum(span.start <= begin < span.end for begin in begins) for name, span in phases.items()}


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Measure, print with the trace's figures, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--provider", default="auto")
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    name = choose_backend(options.provider, on_gpu=on_gpu)
    missing = list(unavailable_reasons(name, on_gpu=on_gpu))
    if not on_gpu or name == "reference" or missing:
        print(f"nothing to measure here: {'; '.join(missing) or 'only the reference backend of FP8 is available'}")
        return
    device = torch.device("cuda")
    model = build(SETTING, name, device)
    with model.cache_fp8_weights():  # the first runs, which are not measured, quantize all weights
        runs = [layer_seconds(model, SETTING, device) for _ in range(options.repetitions + 2)][2:]
        counts = launches(model, SETTING, device)
    found = {part: 1e6 * statistics.median(run[part] for run in runs) for part in TRACE_US}
    facts = torch.cuda.get_device_properties(device)
    print(f"{facts.name}, {facts.multi_processor_count} SMs, backend {name}; microseconds here and in the trace")
    for part, microseconds in found.items():
        print(f"{part:8} {microseconds:8.0f} {TRACE_US[part]:8}  {counts.get(part, 0):5} launches")
    print(f"{'sum':8} {sum(found.values()):8.0f} {sum(TRACE_US.values()):8}  {sum(counts.values()):5} launches")
    if options.json:
        versions = {"device": facts.name, "torch": torch.__version__, "provider": name}
        document = {**versions, "microseconds": found, "launches": counts}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


def small() -> Setting:
    """Run on a CPU, to test the script."""
    config = replace(
        V3, hidden_size=64, num_attention_heads=2, q_lora_rank=32, kv_lora_rank=16, moe_intermediate_size=32
    )
    return Setting(config, expert_ranks=64, tokens=16, rows_per_expert=8)


if __name__ == "__main__":
    main()
