"""The generators stop once for each communication they have launched, in the order that all ranks share."""

from __future__ import annotations

import gc
import weakref
from datetime import timedelta
from typing import Generic, TypeVar

import pytest
import torch
from torch import Tensor

from shoestring.comm.async_comm import AsyncWork, InlineCommunicator, TwoPartWork
from shoestring.comm.exchange.api import Received
from shoestring.comm.exchange.config import ExchangeConfig
from shoestring.comm.exchange.flat import FlatExchange, FlatLayout
from shoestring.comm.groups import ProcessGroups
from shoestring.comm.topology import Topology
from shoestring.comm.trace import ExchangeLabel
from shoestring.comm.traffic import Traffic
from shoestring.parallelism.pipeline.executor import Steps, drive, take_turns
from shoestring.parallelism.weight_grad import WeightGradients
from shoestring.trainer.model.chunk import Chunk
from shoestring.trainer.model.config import ModelConfig
from shoestring.trainer.model.init import initialize
from shoestring.trainer.model.model import Model
from shoestring.trainer.model.recompute import RecomputeModule
from shoestring.trainer.model.tape import LossNormalizers

T = TypeVar("T")

# One dense layer, two with experts, and one depth of MTP: three layers with an exchange.
CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=16,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_attention_heads=2,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    intermediate_size=32,
    moe_intermediate_size=8,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    num_nextn_predict_layers=1,
    initializer_range=0.1,
)
ROUTED_LAYERS = 3
SCALES = LossNormalizers(main=0.01, mtp=0.003, balance=0.1)
LENGTH = 7


class Watched(Generic[T]):
    """A pending communication that writes down when it is waited on."""

    def __init__(self, pending: AsyncWork[T], name: str, diary: list[str]) -> None:
        self._pending, self._name, self._diary = pending, name, diary

    def wait(self) -> T:
        self._diary.append(f"wait {self._name}")
        return self._pending.wait()


class WatchedExchange:
    """A `TokenExchange` that writes down every operation with the number of its dispatch."""

    def __init__(self, exchange: FlatExchange) -> None:
        self._exchange = exchange
        self._number: dict[int, int] = {}
        self.diary: list[str] = []
        self.rows: list[weakref.ref[torch.UntypedStorage]] = []
        self.most_alive = 0

    def dispatch(
        self, tokens_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, label: ExchangeLabel, *, as_tiles: bool = False
    ) -> TwoPartWork[Received[FlatLayout]]:
        number = len(self.rows)
        self.diary.append(f"dispatch {number}")
        pending = self._exchange.dispatch(tokens_TD, weights_TK, experts_TK, label, as_tiles=as_tiles)

        def proceed() -> AsyncWork[Received[FlatLayout]]:
            received = pending.wait()
            self._number[id(received.layout)] = number
            self.rows.append(weakref.ref(received.rows_RD.untyped_storage()))
            self.most_alive = max(self.most_alive, self.alive())
            return Watched(pending, f"dispatch {number}", self.diary)

        return TwoPartWork(proceed)

    def combine(self, rows_RD: Tensor, received: Received[FlatLayout]) -> AsyncWork[Tensor]:
        return self._watched(self._exchange.combine(rows_RD, received), f"combine {self._of(received)}")

    def combine_backward(self, grad_TD: Tensor, received: Received[FlatLayout]) -> AsyncWork[Tensor]:
        pending = self._exchange.combine_backward(grad_TD, received)
        return self._watched(pending, f"combine_backward {self._of(received)}")

    def dispatch_backward(
        self, grad_RD: Tensor, grad_weights_R: Tensor, received: Received[FlatLayout]
    ) -> AsyncWork[tuple[Tensor, Tensor]]:
        pending = self._exchange.dispatch_backward(grad_RD, grad_weights_R, received)
        return self._watched(pending, f"dispatch_backward {self._of(received)}")

    def alive(self) -> int:
        """Dispatches whose rows are still in memory."""
        return sum(row() is not None for row in self.rows)

    def _of(self, received: Received[FlatLayout]) -> int:
        return self._number[id(received.layout)]

    def _watched(self, pending: AsyncWork[T], name: str) -> Watched[T]:
        self.diary.append(name)
        return Watched(pending, name, self.diary)


def make_chunk(
    recompute: frozenset[RecomputeModule] = frozenset(), dtype: torch.dtype = torch.float32
) -> tuple[Chunk, WatchedExchange]:
    model = Model(CONFIG)
    initialize(model, seed=0)
    topology = Topology()
    groups = ProcessGroups.create(topology, 0, timedelta(seconds=1))
    exchange = FlatExchange(
        groups, CONFIG.n_routed_experts, InlineCommunicator(), Traffic(topology, 0), ExchangeConfig()
    )
    watched = WatchedExchange(exchange)
    return Chunk(model, watched, dtype, recompute=recompute), watched


def window() -> tuple[Tensor, Tensor]:
    tokens_BW = torch.randint(0, CONFIG.vocab_size, (2, LENGTH + 2), generator=torch.Generator().manual_seed(4))
    return tokens_BW, torch.ones_like(tokens_BW, dtype=torch.bool)


def run(steps: Steps[T], diary: list[str]) -> T:
    """Drive a generator, writing each yield into the diary of its exchange."""
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
    run(forward.backward(None, WeightGradients()), exchange.diary)
    backwards = (f"{op} {i}" for i in reversed(layers) for op in ("combine_backward", "dispatch_backward"))
    assert exchange.diary == launched_yielded_waited(*backwards)
    assert exchange.diary.count("yield") == 2 * ROUTED_LAYERS


def test_losses_without_a_backward_are_of_the_main_model_alone() -> None:
    chunk, exchange = make_chunk()
    with torch.no_grad():
        alone = run(chunk.forward(*window(), None), exchange.diary).summary
        assert exchange.diary == launched_yielded_waited(
            *(f"{op} {i}" for i in (0, 1) for op in ("dispatch", "combine"))
        )
        with_mtp = run(chunk.forward(*window(), SCALES), exchange.diary).summary
    assert alone.mtp_sum == 0 < with_mtp.mtp_sum
    assert alone.main_sum == with_mtp.main_sum


def test_logits_run_the_main_model_alone() -> None:
    chunk, exchange = make_chunk()
    tokens_BW, _ = window()
    with torch.no_grad():
        logits_BSV = run(chunk.logits(tokens_BW[:, :LENGTH]), exchange.diary)
    assert logits_BSV.shape == (2, LENGTH, CONFIG.vocab_size)
    assert exchange.diary == launched_yielded_waited(*(f"{op} {i}" for i in (0, 1) for op in ("dispatch", "combine")))


def test_two_generators_may_take_turns() -> None:
    def gradients(chunk: Chunk) -> list[Tensor]:
        return [parameter.grad for parameter in chunk.model.parameters() if parameter.grad is not None]

    tokens_BW, valid_BW = window()
    alone, _ = make_chunk()
    for rows in (slice(0, 1), slice(1, 2)):
        drive(drive(alone.forward(tokens_BW[rows], valid_BW[rows], SCALES)).backward(None, WeightGradients()))

    chunk, _ = make_chunk()
    first = drive(chunk.forward(tokens_BW[:1], valid_BW[:1], SCALES))
    backward, forward = first.backward(None, WeightGradients()), chunk.forward(tokens_BW[1:], valid_BW[1:], SCALES)
    _, second = take_turns(backward, forward)
    drive(second.backward(None, WeightGradients()))
    assert len(gradients(chunk)) == len(list(chunk.model.parameters()))
    for ours, expected in zip(gradients(chunk), gradients(alone), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-8)


def test_a_backward_frees_each_layer_when_it_is_done() -> None:
    chunk, exchange = make_chunk()
    forward = drive(chunk.forward(*window(), SCALES))
    assert exchange.alive() == ROUTED_LAYERS
    drive(forward.backward(None, WeightGradients()))
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
            result = drive(chunk.forward(tokens_BW, valid_BW, None)).summary.main_sum
        else:
            result = drive(chunk.logits(tokens_BW[:, :LENGTH]))
    assert not saved
    assert not result.requires_grad
    assert exchange.most_alive <= 2  # while a layer runs, the one before it goes
    gc.collect()
    assert exchange.alive() == 0
    assert all(parameter.grad is None for parameter in chunk.model.parameters())
