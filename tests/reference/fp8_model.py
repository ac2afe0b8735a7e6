"""The reference model in FP8: every Linear but head and router, by the NumPy definition, with ordinary autograd around.

What the report says of each (§3.3): the input after attention is kept in E5M6, SwiGLU's input is kept in FP8 and its
output formed again, scales of the rows that experts receive and of the gradients that they receive are powers of two.
Gate weights multiply before the down projection.

Shape suffixes: T tokens (those of one expert), D hidden, F expert width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from shoestring.tests.reference import deepseek_v3, fp8
from shoestring.tests.reference.deepseek_v3 import Params, ReferenceConfig, Routing

_PLAIN = ("lm_head.weight", "mlp.gate.weight")


@contextmanager
def in_fp8(params: Params, tokens_apart: int) -> Iterator[None]:
    """Compute `deepseek_v3.losses` of these very tensors in FP8 inside.

    So many tokens are on one rank: no tile of a weight's gradient holds tokens of two but an expert's.
    """
    plain = {id(tensor) for name, tensor in params.items() if name.endswith(_PLAIN)}
    after_attention = {id(tensor) for name, tensor in params.items() if name.endswith("o_proj.weight")}

    class Functions:
        """torch.nn.functional with another `linear`."""

        def __getattr__(self, name: str) -> Any:
            return getattr(F, name)

        @staticmethod
        def linear(x: Tensor, weight: Tensor) -> Tensor:
            if id(weight) in plain:
                return F.linear(x, weight)
            return linear(x, weight, id(weight) in after_attention, apart=tokens_apart)

    with (
        patch.object(deepseek_v3, "F", Functions()),
        patch.object(deepseek_v3, "swiglu", partial(swiglu, apart=tokens_apart)),
        patch.object(deepseek_v3, "mixture", partial(mixture, tokens_apart=tokens_apart)),
    ):
        yield


def linear(
    x: Tensor, weight: Tensor, after_attention: bool = False, of_expert: bool = False, apart: int | None = None
) -> Tensor:
    """Return x Wᵀ. A tile of the weight's gradient ends after every `apart` rows."""
    flat = x.flatten(0, -2)
    out: Tensor = _Linear.apply(flat, weight, after_attention, of_expert, apart)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, after_attention: bool, of_expert: bool, apart: int | None
    ) -> Tensor:
        power = after_attention or of_expert
        tiles, blocks = quantize(x, power), fp8.quantize(weight.detach().numpy(), 128, 128, power_of_two=False)
        kept = fp8.quantize(x.detach().double().numpy(), 1, 128, True, fp8.E5M6) if after_attention else tiles
        ctx.kept, ctx.blocks, ctx.power, ctx.apart = torch.from_numpy(fp8.dequantize(kept)), blocks, power, apart
        return torch.from_numpy(fp8.product(tiles, blocks)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        grad_x = fp8.product(quantize(grad), transposed(ctx.blocks))
        grad_weight = weight_gradient(grad, ctx.kept, ctx.power, ctx.apart)
        return torch.from_numpy(grad_x).to(grad.dtype), grad_weight, None, None, None


def activation(gate_up: Tensor, gates: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up * gates


class _Down(torch.autograd.Function):
    """SwiGLU, times the gates, and the down projection."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, gates: Tensor, weight: Tensor, of_expert: bool, apart: int | None) -> Tensor:
        ctx.apart = apart
        ctx.blocks = fp8.quantize(weight.detach().numpy(), 128, 128, power_of_two=False)
        ctx.kept, ctx.gates, ctx.of_expert = fp8.dequantize(quantize(gate_up)), gates, of_expert
        return torch.from_numpy(fp8.product(quantize(activation(gate_up, gates)), ctx.blocks)).to(gate_up.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        with torch.enable_grad():
            gate_up = torch.from_numpy(ctx.kept).to(grad.dtype).requires_grad_()
            gates = ctx.gates.detach().requires_grad_()
            inner = activation(gate_up, gates)
        tiles = quantize(grad, ctx.of_expert)
        received = torch.from_numpy(fp8.dequantize(tiles)) if ctx.of_expert else grad
        grad_weight = weight_gradient(received.to(grad.dtype), inner, power_of_two=False, apart=ctx.apart)
        grad_inner = torch.from_numpy(fp8.product(tiles, transposed(ctx.blocks))).to(grad.dtype)
        return *torch.autograd.grad(inner, (gate_up, gates), grad_inner), grad_weight, None, None


def weight_gradient(grad: Tensor, x: Tensor, power_of_two: bool, apart: int | None) -> Tensor:
    """Return gradᵀ x in the dtype of `grad`, the sum of FP32 products over `apart` rows each."""
    size = apart or max(1, len(x))
    products = [
        torch.from_numpy(fp8.product(quantize(ours.T), quantize(theirs.T, power_of_two))).to(grad.dtype)
        for ours, theirs in zip(grad.split(size), x.split(size), strict=True)
    ]
    return torch.stack(products).sum(dim=0)


def quantize(x: Tensor, power_of_two: bool = False) -> tuple[fp8.Array, fp8.Array]:
    """Quantize rows in tiles of 1 x 128."""
    return fp8.quantize(x.detach().double().numpy(), 1, 128, power_of_two)


def transposed(blocks: tuple[fp8.Array, fp8.Array]) -> tuple[fp8.Array, fp8.Array]:
    return blocks[0].T, blocks[1].T


def swiglu(params: Params, prefix: str, x: Tensor, gates: Tensor | None = None, apart: int | None = None) -> Tensor:
    """Replace `deepseek_v3.swiglu`; with gates it is an expert's."""
    of_expert = gates is not None
    fused = torch.cat((params[f"{prefix}.gate_proj.weight"], params[f"{prefix}.up_proj.weight"]))
    gate_up = linear(x, fused, of_expert=of_expert, apart=apart)
    gates = torch.ones_like(gate_up[..., :1]) if gates is None else gates[:, None]
    flat, down = gate_up.flatten(0, -2), params[f"{prefix}.down_proj.weight"]
    out: Tensor = _Down.apply(flat, gates.flatten(0, -2), down, of_expert, apart)  # type: ignore[no-untyped-call]
    return out.view(x.shape)


def mixture(
    params: Params, prefix: str, config: ReferenceConfig, x_BSD: Tensor, tokens_apart: int
) -> tuple[Tensor, Routing]:
    """Replace `deepseek_v3.mixture`."""
    routing = deepseek_v3.route(params, prefix, config, x_BSD)
    x_TD, gates_TE, chosen_TE = x_BSD.flatten(0, 1), routing.gates.flatten(0, 1), routing.chosen.flatten(0, 1)
    out_TD = swiglu(params, f"{prefix}.shared_experts", x_TD, apart=tokens_apart)
    for expert in range(config.n_routed_experts):
        tokens = chosen_TE[:, expert].nonzero()[:, 0]
        if len(tokens):
            rows = swiglu(params, f"{prefix}.experts.{expert}", x_TD[tokens], gates_TE[tokens, expert])
            out_TD = out_TD.index_add(0, tokens, rows)
    return out_TD.view_as(x_BSD), routing
