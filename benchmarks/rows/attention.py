"""Causal attention at DeepSeek-V3's widths: which kernel torch takes for it, its times, and what it is off by.

Letters: B batch, H heads, S sequence, W width of queries and keys, V of values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoestring.benchmarks.rows.row import Check, Figures, Machine, expect, relative_error
from shoestring.trainer.model.causal import causal_attention

QUERY, VALUE = 192, 128
SCALE = QUERY**-0.5
V3 = (1, 128, 4096)
"""B, H, S of one micro-batch."""
_NAMES = ("output", "gradient of queries", "gradient of keys", "gradient of values")


def attention(machine: Machine) -> Figures:
    """BF16 beside FP64 with plain tensors, on fewer heads and positions; times at V3's shape (DeepSeek: 1.24 ms
    forward, 4.26 ms backward on an H800).
    """
    inputs = _inputs(machine, 1, 4, 1024 if machine.on_gpu else 192)
    pairs = zip(("output", "q's", "k's", "v's"), run(*inputs), _plain(*inputs), strict=True)
    error = max(
        expect(f"the {name}" + " gradient" * (name != "output"), relative_error(a, b), 2e-2) for name, a, b in pairs
    )
    timed = _inputs(machine, *(V3 if machine.on_gpu else (1, 4, 192)))

    def forward() -> None:
        with torch.no_grad():
            causal_attention(*timed[:3], SCALE)

    alone, both = machine.seconds(forward), machine.seconds(lambda: run(*timed))
    return {
        "kernels": _kernels(machine, timed),
        "forward_ms": alone * 1e3,
        "backward_ms": (both - alone) * 1e3,
        "error": error,
    }


def _inputs(machine: Machine, batch: int, heads: int, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values and the gradient of the output; heads of a token are neighbors in memory."""
    widths = (QUERY, QUERY, VALUE, VALUE)
    shapes = [(batch, length, heads, width) for width in widths]
    q, k, v, grad = (torch.randn(shape, device=machine.device).bfloat16().transpose(1, 2) for shape in shapes)
    return q, k, v, grad


def run(q_BHSW: Tensor, k_BHSW: Tensor, v_BHSV: Tensor, grad_BHSV: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients of queries, keys and values."""
    leaves = [x.detach().requires_grad_() for x in (q_BHSW, k_BHSW, v_BHSV)]
    out_BHSV = causal_attention(leaves[0], leaves[1], leaves[2], SCALE)
    return out_BHSV.detach(), *torch.autograd.grad(out_BHSV, leaves, grad_BHSV)


def _plain(q_BHSW: Tensor, k_BHSW: Tensor, v_BHSV: Tensor, grad_BHSV: Tensor) -> tuple[Tensor, ...]:
    """The same in FP64, with every score in memory."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q_BHSW, k_BHSW, v_BHSV))
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    scores_BHSS = (SCALE * q @ k.transpose(2, 3)).masked_fill(later, float("-inf"))
    out_BHSV = scores_BHSS.softmax(dim=-1) @ v
    return out_BHSV.detach(), *torch.autograd.grad(out_BHSV, (q, k, v), grad_BHSV.double())


def _kernels(machine: Machine, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> str:
    """The two kernels that took longest, forward and backward: what ran, whatever was chosen."""
    if not machine.on_gpu:
        return "plain products"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(*inputs)
        machine.synchronise()
    events = sorted(profile.key_averages(), key=lambda event: event.self_device_time_total, reverse=True)
    return " and ".join(event.key[:90] for event in events[:2])


CHECKS = (Check("attention, 192/128, bf16", attention, mandatory=True, seconds=120),)
