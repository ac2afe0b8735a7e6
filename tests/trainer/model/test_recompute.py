"""Recomputed activations equal the forward's; communication and expert choice never run twice."""

from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from shoestring.comm.errors import Problem
from shoestring.parallelism.pipeline.instruction import run_to_completion
from shoestring.parallelism.weight_grad import DelayedWeightGradients
from shoestring.tests.trainer.model.policies import POLICIES, names
from shoestring.tests.trainer.model.small_chunk import LENGTH, SCALES, make_chunk, window
from shoestring.trainer.model import recompute as recompute_module
from shoestring.trainer.model.recompute import (
    RecomputeConfig,
    RecomputeModule,
    SelectiveRecompute,
    run_checkpointed,
    run_recomputable,
)
from shoestring.trainer.model.router import Router
from shoestring.trainer.precision.fp8 import Fp8LinearOps
from shoestring.trainer.precision.reference import ReferenceBackend

REPORT = frozenset({RecomputeModule.NORM, RecomputeModule.UP_PROJECTION, RecomputeModule.SWIGLU})


def gradients(
    policy: frozenset[RecomputeModule], dtype: torch.dtype, *, deferred: bool = False, fp8: bool = False
) -> tuple[list[Tensor], list[str]]:
    """Return losses and gradients of one micro-batch, and what was sent."""
    chunk, exchange = make_chunk(policy, dtype)
    if fp8:
        chunk.model.enable_fp8(Fp8LinearOps(ReferenceBackend()))
    forward = run_to_completion(chunk.forward(*window(), SCALES))
    weights = DelayedWeightGradients(deferred=deferred)
    run_to_completion(forward.backward(None, weights))
    weights.flush()
    found = [forward.metrics.main_loss_sum, forward.metrics.mtp_loss_sum, forward.metrics.balance_loss_sum]
    for parameter in chunk.model.parameters():
        assert parameter.grad is not None
        found.append(parameter.grad)
    return found, exchange.diary


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("policy", POLICIES[1:], ids=names)
def test_recomputing_changes_no_bit(policy: frozenset[RecomputeModule], dtype: torch.dtype) -> None:
    kept, sent = gradients(frozenset(), dtype)
    recomputed, sent_again = gradients(policy, dtype)
    assert all(map(torch.equal, recomputed, kept))
    assert sent_again == sent
    split, _ = gradients(policy, dtype, deferred=True)
    assert all(map(torch.equal, split, kept))


@pytest.mark.parametrize(
    "policy",
    [frozenset({RecomputeModule.NORM}), REPORT, frozenset(RecomputeModule) - {RecomputeModule.GATE_UP}],
    ids=names,
)
def test_nor_does_it_in_fp8(policy: frozenset[RecomputeModule]) -> None:
    kept, _ = gradients(frozenset(), torch.bfloat16, fp8=True)
    for deferred in (False, True):
        recomputed, _ = gradients(policy, torch.bfloat16, deferred=deferred, fp8=True)
        assert all(map(torch.equal, recomputed, kept))


def test_each_module_is_recomputed_once_for_each_use() -> None:
    """Counts the recipes that are used: without any, the test above would prove nothing."""
    used: list[str] = []
    result = recompute_module._Recipe.result

    def counted(self: recompute_module._Recipe, index: int) -> Tensor:
        if not self._results:
            used.append(getattr(self._function, "__name__", "module"))
        return result(self, index)

    with patch.object(recompute_module._Recipe, "result", counted):
        gradients(frozenset(RecomputeModule), torch.float32)
    layers, routed = 4, 3  # with that of MTP
    assert used.count("_heads") == used.count("replay") == layers
    assert used.count("rms_norm") == 4 * layers + 1  # two of them in attention; the last is that before MTP
    assert used.count("_normed") == 1  # MTP's pair of norms
    assert used.count("grouped_linear") == routed
    assert used.count("module") == layers
    assert used.count("swiglu") == layers + routed


def test_where_tokens_go_is_decided_once() -> None:
    choose, decided = Router._select, []

    def counted(self: Router, affinity_TE: Tensor) -> Tensor:
        decided.append(affinity_TE)
        return choose(self, affinity_TE)

    with patch.object(Router, "_select", counted):
        gradients(frozenset(RecomputeModule), torch.float32)
    assert len(decided) == 3


def test_logits_need_no_recipes() -> None:
    chunk, _ = make_chunk(frozenset(RecomputeModule))
    with torch.no_grad(), patch.object(SelectiveRecompute, "register") as note:
        run_to_completion(chunk.compute_logits(window()[0][:, :LENGTH]))
    assert not note.called


def test_a_result_goes_when_the_last_who_kept_it_has_run() -> None:
    made: list[int] = []

    def double(x: Tensor) -> Tensor:
        made.append(len(made))
        return 2 * x

    x, recompute = torch.randn(5, requires_grad=True), SelectiveRecompute(frozenset({RecomputeModule.NORM}))
    with recompute.enable():
        doubled = run_recomputable(RecomputeModule.NORM, double, x)
        first, second = doubled.sin().sum(), doubled[1:].cos().sum()
        run_recomputable(RecomputeModule.SWIGLU, double, x).sin()  # not in the policy
    storage = doubled.untyped_storage()
    assert len(recompute._results) == 1
    del doubled, storage
    assert len(recompute._results) == 0
    made.clear()
    (first + second).backward()
    assert made == [0]
    expected = 2 * (2 * x).cos()
    expected[1:] -= 2 * (2 * x).sin()[1:]
    torch.testing.assert_close(x.grad, expected)


def test_a_function_that_returns_its_input_has_made_nothing() -> None:
    x, recompute = torch.randn(5, requires_grad=True), SelectiveRecompute(frozenset(RecomputeModule))
    with recompute.enable():
        same = run_recomputable(RecomputeModule.NORM, lambda x: x.view(-1), x)
        result = same.sin().sum()
    assert len(recompute._results) == 0
    result.backward()
    torch.testing.assert_close(x.grad, x.cos())


def test_a_replayed_function_keeps_its_inputs_alone() -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x, recompute = torch.randn(5, requires_grad=True), SelectiveRecompute(frozenset({RecomputeModule.ATTENTION}))
    with recompute.enable(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run_checkpointed(RecomputeModule.ATTENTION, lambda x, scale: (x.exp().sin() * scale).cos(), x, 3.0)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()]
    (gradient,) = torch.autograd.grad(result.sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad((x.exp().sin() * 3.0).cos().sum(), x)[0])


def problems(*parts: str) -> Iterator[Problem]:
    return RecomputeConfig(modules=parts).problems()


def test_an_unknown_part_is_refused_and_so_is_one_twice() -> None:
    assert not list(problems("norm", "swiglu"))
    unknown, twice = problems("norm", "softmax", "norm")
    assert (unknown.field, unknown.value) == ("modules[1]", "softmax")
    assert all(part.value in unknown.hint for part in RecomputeModule)
    assert (twice.field, twice.value) == ("modules[2]", "norm")
