"""Rows for causal attention at DeepSeek-V3's widths with each backend: times, errors, and the kernels that ran.

Letters: B batch, H heads, S sequence, W width of queries and keys, V of values.
"""

from functools import partial

import torch
from torch import Tensor

from shoestring.benchmarks.rows.row import Check, Figures, Machine, NotHere, expect, relative_error
from shoestring.trainer.model.attention_backend import (
    CPU_ATTENTION,
    GPU_BACKENDS,
    AttentionBackend,
    AttentionFunction,
    AttentionShape,
    GpuCapabilities,
    attention_by_name,
    select_attention,
    unsupported_gpu_reasons,
    unsupported_shape_reasons,
)

QUERY, VALUE = 192, 128
SCALE = QUERY**-0.5
V3 = AttentionShape(1, 128, 4096, QUERY, VALUE, torch.bfloat16)
"""Shape of one micro-batch."""
_NAMES = ("output", "gradient of queries", "gradient of keys", "gradient of values")


def attention(name: str, machine: Machine) -> Figures:
    """Compare BF16 with FP64 on few heads and positions, then time V3's shape.

    DeepSeek's trace has 1.24 ms forward and 4.26 ms backward on an H800.
    """
    choice = _choose(name, machine)
    inputs = _inputs(machine, 4, 1024 if machine.on_gpu else 192)
    pairs = zip(_NAMES, run(choice.core_attention, *inputs), _plain(*inputs), strict=True)
    error = max(expect(f"the {what}", relative_error(ours, plain), 2e-2) for what, ours, plain in pairs)
    timed = _inputs(machine, V3.heads, V3.sequence_length) if machine.on_gpu else inputs

    def forward() -> None:
        with torch.no_grad():
            choice.core_attention(*timed[:3], SCALE)

    alone, both = machine.seconds(forward), machine.seconds(lambda: run(choice.core_attention, *timed))
    return {
        "backend": choice.name,
        "forward_ms": alone * 1e3,
        "backward_ms": (both - alone) * 1e3,
        "error": error,
        "kernels": _kernels(machine, choice.core_attention, timed),
    }


def _choose(name: str, machine: Machine) -> AttentionBackend:
    """Return the backend that a run of V3 would select here, or the backend `name`."""
    if not machine.on_gpu:
        if name != "auto":
            raise NotHere("torch sees no GPU")
        return CPU_ATTENTION
    if name == "auto":
        return select_attention("auto", V3, GpuCapabilities.detect())
    missing = [*unsupported_shape_reasons(name, V3), *unsupported_gpu_reasons(name, V3, GpuCapabilities.detect())]
    if missing:
        raise NotHere("; ".join(missing))
    return attention_by_name(name)


def _inputs(machine: Machine, heads: int, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return queries, keys, values and an output gradient; the heads of a token are adjacent in memory."""
    shapes = [(1, length, heads, width) for width in (QUERY, QUERY, VALUE, VALUE)]
    q, k, v, grad = (torch.randn(shape, device=machine.device).bfloat16().transpose(1, 2) for shape in shapes)
    return q, k, v, grad


def run(
    attend: AttentionFunction, q_BHSW: Tensor, k_BHSW: Tensor, v_BHSV: Tensor, grad_BHSV: Tensor
) -> tuple[Tensor, ...]:
    """Return the output and the gradients of queries, keys and values."""
    q, k, v = (x.detach().requires_grad_() for x in (q_BHSW, k_BHSW, v_BHSV))
    out_BHSV = attend(q, k, v, SCALE)
    return out_BHSV.detach(), *torch.autograd.grad(out_BHSV, (q, k, v), grad_BHSV)


def _plain(q_BHSW: Tensor, k_BHSW: Tensor, v_BHSV: Tensor, grad_BHSV: Tensor) -> tuple[Tensor, ...]:
    """Return output and gradients in FP64, computed with all scores in memory."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q_BHSW, k_BHSW, v_BHSV))
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    scores_BHSS = (SCALE * q @ k.transpose(2, 3)).masked_fill(later, float("-inf"))
    out_BHSV = scores_BHSS.softmax(dim=-1) @ v
    return out_BHSV.detach(), *torch.autograd.grad(out_BHSV, (q, k, v), grad_BHSV.double())


def _kernels(machine: Machine, attend: AttentionFunction, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> str:
    """Return the slowest kernels of forward and backward, which show what really ran."""
    if not machine.on_gpu:
        return "plain products"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(attend, *inputs)
        machine.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: event.self_device_time_total, reverse=True)
    return " and ".join(event.key[:90] for event in events[:2])


CHECKS = (
    Check("attention 192/128, as chosen", partial(attention, "auto"), mandatory=True, seconds=90),
    *(
        Check(f"attention 192/128, {name}", partial(attention, name), mandatory=False, seconds=60)
        for name in GPU_BACKENDS
    ),
)
