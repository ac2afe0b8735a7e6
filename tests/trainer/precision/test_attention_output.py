"""Attention's output, kept once in E5M6 for two backwards."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from shoestring.trainer.model.attention_backend import GPU_BACKENDS
from shoestring.trainer.model.cpu_attention import causal_attention_reference
from shoestring.trainer.precision.attention_output import SharedAttentionOutput
from shoestring.trainer.precision.e5m6 import pack_e5m6, unpack_e5m6

BATCH, HEADS, LENGTH, WIDTH, SCALE = 2, 3, 40, 16, 0.3


def heads() -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values, strided like projections write them."""
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, LENGTH, HEADS, WIDTH)
    q, k, v = (torch.randn(shape, generator=generator).transpose(1, 2).requires_grad_() for _ in range(3))
    return q, k, v


def rows(x_BHSV: Tensor) -> Tensor:
    """Return [B · S, H · V]."""
    return x_BHSV.detach().transpose(1, 2).flatten(2).flatten(0, 1)


def gradients(inputs: Sequence[Tensor], output: Tensor, grad: Tensor) -> list[Tensor]:
    """Return the gradients of softmax attention; the sum over keys of P ⊙ dP is that over values of O ⊙ dO."""
    q, k, v = (x.detach().double() for x in inputs)
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    p = (SCALE * q @ k.transpose(2, 3)).masked_fill(hidden, float("-inf")).softmax(-1)
    grad, output = grad.double(), output.double()
    grad_score = p * (grad @ v.transpose(2, 3) - (grad * output).sum(-1, keepdim=True)) * SCALE
    return [grad_score @ k, grad_score.transpose(2, 3) @ q, p.transpose(2, 3) @ grad]


def test_the_backward_of_attention_reads_what_was_packed() -> None:
    inputs, shared = heads(), SharedAttentionOutput()
    out = shared.run_attention(causal_attention_reference, *inputs, SCALE)
    torch.testing.assert_close(out, causal_attention_reference(*inputs, SCALE))
    packed = pack_e5m6(rows(out))
    shared.replace_with_e5m6(packed)
    rounded = unpack_e5m6(packed, torch.float32).view(BATCH, LENGTH, HEADS, WIDTH).transpose(1, 2)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(out, inputs, grad)
    of_rounded, exact = (gradients(inputs, output, grad) for output in (rounded, out.detach()))
    for ours, expected in zip(found, of_rounded, strict=True):
        assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (found[0] - exact[0]).abs().max() > 1e-4 * exact[0].abs().max()  # the rounding is visible


def test_the_wide_output_goes_with_the_forward() -> None:
    inputs, shared = heads(), SharedAttentionOutput()
    out = shared.run_attention(causal_attention_reference, *inputs, SCALE)
    storage, packed, end = StorageWeakRef(out.untyped_storage()), pack_e5m6(rows(out)), out.sum()
    shared.replace_with_e5m6(packed)
    del out
    assert storage.expired()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(end, inputs))


class TokensFirst(torch.autograd.Function):
    """An operator that keeps its output as [B, S, H, V] for its backward, as FlashAttention-3 does."""

    @staticmethod
    def forward(ctx: Any, q_BHSW: Tensor, k_BHSW: Tensor, v_BHSV: Tensor) -> Tensor:
        out_BSHV = causal_attention_reference(q_BHSW, k_BHSW, v_BHSV, SCALE).transpose(1, 2).contiguous()
        ctx.save_for_backward(q_BHSW, k_BHSW, v_BHSV, out_BSHV)
        return out_BSHV

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        *inputs, out_BSHV = ctx.saved_tensors
        return tuple(gradients(inputs, out_BSHV.transpose(1, 2), grads[0].transpose(1, 2)))


def test_an_output_that_is_kept_in_another_view_is_found() -> None:
    inputs, shared = tuple(x.detach().double().requires_grad_() for x in heads()), SharedAttentionOutput()

    def attend(*given: Tensor) -> Tensor:
        out: Tensor = TokensFirst.apply(*given)  # type: ignore[no-untyped-call]
        return out.transpose(1, 2)

    out = shared.run_attention(attend, *inputs)
    storage, packed = StorageWeakRef(out.untyped_storage()), pack_e5m6(rows(out).float())
    rounded = unpack_e5m6(packed, torch.float64).view(BATCH, LENGTH, HEADS, WIDTH).transpose(1, 2)
    grad, end = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64), out.clone()
    shared.replace_with_e5m6(packed)
    del out
    assert storage.expired()
    for ours, expected in zip(torch.autograd.grad(end, inputs, grad), gradients(inputs, rounded, grad), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", ["cudnn", "efficient"])
def test_the_operators_of_gpus_keep_an_output_that_is_found(name: str) -> None:
    """Tensors without memory suffice: the operator's formula alone decides which tensor autograd keeps."""
    inputs = tuple(
        torch.empty(BATCH, LENGTH, HEADS, WIDTH, dtype=torch.bfloat16, device="meta").transpose(1, 2).requires_grad_()
        for _ in range(3)
    )
    shared = SharedAttentionOutput()
    out = shared.run_attention(GPU_BACKENDS[name].core_attention, *inputs, SCALE)
    storage, packed, end = StorageWeakRef(out.untyped_storage()), pack_e5m6(rows(out)), out.sum()
    shared.replace_with_e5m6(packed)
    del out
    assert storage.expired()
    assert [grad.shape for grad in torch.autograd.grad(end, inputs)] == [x.shape for x in inputs]


def test_an_output_that_is_not_packed_is_kept_as_it_is() -> None:
    inputs = heads()
    found, expected = (
        torch.autograd.grad(attend(causal_attention_reference, *inputs, SCALE).square().sum(), inputs)
        for attend in (SharedAttentionOutput().run_attention, lambda attention, *others: attention(*others))
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("made", [torch.clone, lambda x: x[..., :-1].contiguous()], ids=["a copy", "another shape"])
def test_another_tensor_than_the_output_is_not_taken_for_it(made: Callable[[Tensor], Tensor]) -> None:
    """A kernel may keep a copy of its output, or pad it: the numbers stay right, and nothing is saved."""
    inputs, shared = heads(), SharedAttentionOutput()
    out = shared.run_attention(lambda *given: made(causal_attention_reference(*given)), *inputs, SCALE)
    shared.replace_with_e5m6(pack_e5m6(torch.zeros(BATCH * LENGTH, HEADS * WIDTH)))
    theirs = torch.autograd.grad(made(causal_attention_reference(*inputs, SCALE)).sum(), inputs)
    for ours, expected in zip(torch.autograd.grad(out.sum(), inputs), theirs, strict=True):
        assert torch.equal(ours, expected)
