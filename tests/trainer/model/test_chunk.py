"""The generators yield once for each communication they have launched, in the order that all ranks share."""

import gc

import pytest
import torch
from torch import Tensor

from shoestring.parallelism.pipeline.instruction import Resumable, interleave, run_to_completion
from shoestring.parallelism.weight_grad import DelayedWeightGradients
from shoestring.tests.trainer.model.small_chunk import CONFIG, LENGTH, ROUTED_LAYERS, SCALES, T, make_chunk, window
from shoestring.trainer.model.chunk import Chunk


def run(steps: Resumable[T], diary: list[str]) -> T:
    """Run a generator; log each yield in the diary of its exchange."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            result: T = stop.value
            return result
        diary.append("yield")


def launched_yielded_waited(*names: str) -> list[str]:
    return [entry for name in names for entry in (name, "yield", f"wait {name}")]


def test_one_yield_for_each_communication_between_its_launch_and_its_wait() -> None:
    chunk, exchange = make_chunk()
    forward = run(chunk.forward(*window(), SCALES), exchange.diary)
    layers = range(ROUTED_LAYERS)
    assert exchange.diary == launched_yielded_waited(*(f"{op} {i}" for i in layers for op in ("dispatch", "combine")))
    assert exchange.diary.count("yield") == 2 * ROUTED_LAYERS

    exchange.diary.clear()
    run(forward.backward(None, DelayedWeightGradients()), exchange.diary)
    backwards = (f"{op} {i}" for i in reversed(layers) for op in ("combine_backward", "dispatch_backward"))
    assert exchange.diary == launched_yielded_waited(*backwards)
    assert exchange.diary.count("yield") == 2 * ROUTED_LAYERS


def test_losses_without_a_backward_are_of_the_main_model_alone() -> None:
    chunk, exchange = make_chunk()
    with torch.no_grad():
        alone = run(chunk.forward(*window(), None), exchange.diary).metrics
        assert exchange.diary == launched_yielded_waited(
            *(f"{op} {i}" for i in (0, 1) for op in ("dispatch", "combine"))
        )
        with_mtp = run(chunk.forward(*window(), SCALES), exchange.diary).metrics
    assert alone.mtp_loss_sum == 0 < with_mtp.mtp_loss_sum
    assert alone.main_loss_sum == with_mtp.main_loss_sum


def test_logits_run_the_main_model_alone() -> None:
    chunk, exchange = make_chunk()
    tokens_BW, _ = window()
    with torch.no_grad():
        logits_BSV = run(chunk.compute_logits(tokens_BW[:, :LENGTH]), exchange.diary)
    assert logits_BSV.shape == (2, LENGTH, CONFIG.vocab_size)
    assert exchange.diary == launched_yielded_waited(*(f"{op} {i}" for i in (0, 1) for op in ("dispatch", "combine")))


def test_two_generators_may_alternate() -> None:
    def gradients(chunk: Chunk) -> list[Tensor]:
        return [parameter.grad for parameter in chunk.model.parameters() if parameter.grad is not None]

    tokens_BW, valid_BW = window()
    alone, _ = make_chunk()
    for rows in (slice(0, 1), slice(1, 2)):
        run_to_completion(
            run_to_completion(alone.forward(tokens_BW[rows], valid_BW[rows], SCALES)).backward(
                None, DelayedWeightGradients()
            )
        )

    chunk, _ = make_chunk()
    first = run_to_completion(chunk.forward(tokens_BW[:1], valid_BW[:1], SCALES))
    backward, forward = (
        first.backward(None, DelayedWeightGradients()),
        chunk.forward(tokens_BW[1:], valid_BW[1:], SCALES),
    )
    _, second = interleave(backward, forward)
    run_to_completion(second.backward(None, DelayedWeightGradients()))
    assert len(gradients(chunk)) == len(list(chunk.model.parameters()))
    for ours, expected in zip(gradients(chunk), gradients(alone), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-8)


def test_a_backward_frees_each_layer_when_it_is_done() -> None:
    chunk, exchange = make_chunk()
    forward = run_to_completion(chunk.forward(*window(), SCALES))
    assert exchange.alive() == ROUTED_LAYERS
    run_to_completion(forward.backward(None, DelayedWeightGradients()))
    del forward
    gc.collect()
    assert exchange.alive() == 0


@pytest.mark.parametrize("kind", ["losses", "logits"])
def test_without_gradients_nothing_is_kept(kind: str) -> None:
    chunk, exchange = make_chunk()
    tokens_BW, valid_BW = window()
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if kind == "losses":
            result = run_to_completion(chunk.forward(tokens_BW, valid_BW, None)).metrics.main_loss_sum
        else:
            result = run_to_completion(chunk.compute_logits(tokens_BW[:, :LENGTH]))
    assert not saved
    assert not result.requires_grad
    assert exchange.most_alive <= 2  # while a layer runs, the one before it is freed
    gc.collect()
    assert exchange.alive() == 0
    assert all(parameter.grad is None for parameter in chunk.model.parameters())
