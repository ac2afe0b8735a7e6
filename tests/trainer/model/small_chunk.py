"""A small chunk, and an exchange that logs its launches and waits."""

import weakref
from datetime import timedelta
from typing import Generic, TypeVar

import torch
from torch import Tensor

from shoestring.comm.async_comm import AsyncWork, TwoPartWork
from shoestring.comm.exchange.api import UNLABELED, DispatchedTokens
from shoestring.comm.exchange.flat import FlatExchange, FlatLayout
from shoestring.comm.groups import ExpertGroups, ProcessGroups
from shoestring.comm.topology import Topology
from shoestring.comm.trace import NULL_RECORDER, ExchangeLabel, SpanRecorder
from shoestring.trainer.model.chunk import Chunk
from shoestring.trainer.model.config import ModelConfig
from shoestring.trainer.model.forward_context import LossNormalizers
from shoestring.trainer.model.model import Model, initialize_weights
from shoestring.trainer.model.recompute import RecomputeModule

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
SCALES = LossNormalizers(main_loss=0.01, mtp_loss=0.003, balance_loss=0.1)
LENGTH = 7


class Watched(Generic[T]):
    """Pending communication that logs the wait for it."""

    def __init__(self, pending: AsyncWork[T], name: str, diary: list[str]) -> None:
        self._pending, self._name, self._diary = pending, name, diary

    def wait(self) -> T:
        self._diary.append(f"wait {self._name}")
        return self._pending.wait()


class WatchedExchange(FlatExchange):
    """A `TokenExchange` that logs every operation with the number of its dispatch."""

    def __init__(self, groups: ExpertGroups, num_experts: int) -> None:
        super().__init__(groups, num_experts)
        self._number: dict[int, int] = {}
        self.diary: list[str] = []
        self.rows: list[weakref.ref[torch.UntypedStorage]] = []
        self.most_alive = 0

    def dispatch(
        self,
        tokens_TD: Tensor,
        weights_TK: Tensor,
        experts_TK: Tensor,
        label: ExchangeLabel = UNLABELED,
        *,
        keep_quantized: bool = False,
    ) -> TwoPartWork[DispatchedTokens[FlatLayout]]:
        number = len(self.rows)
        self.diary.append(f"dispatch {number}")
        pending = super().dispatch(tokens_TD, weights_TK, experts_TK, label, keep_quantized=keep_quantized)

        def proceed() -> AsyncWork[DispatchedTokens[FlatLayout]]:
            received = pending.wait()
            self._number[id(received.layout)] = number
            self.rows.append(weakref.ref(received.rows_RD.untyped_storage()))
            self.most_alive = max(self.most_alive, self.alive())
            return Watched(pending, f"dispatch {number}", self.diary)

        return TwoPartWork(proceed)

    def combine(self, rows_RD: Tensor, received: DispatchedTokens[FlatLayout]) -> AsyncWork[Tensor]:
        return self._watched(super().combine(rows_RD, received), f"combine {self._of(received)}")

    def combine_backward(self, grad_TD: Tensor, received: DispatchedTokens[FlatLayout]) -> AsyncWork[Tensor]:
        pending = super().combine_backward(grad_TD, received)
        return self._watched(pending, f"combine_backward {self._of(received)}")

    def dispatch_backward(
        self, grad_RD: Tensor, grad_weights_R: Tensor, received: DispatchedTokens[FlatLayout]
    ) -> AsyncWork[tuple[Tensor, Tensor]]:
        pending = super().dispatch_backward(grad_RD, grad_weights_R, received)
        return self._watched(pending, f"dispatch_backward {self._of(received)}")

    def alive(self) -> int:
        """Number of dispatches whose rows are in memory."""
        return sum(row() is not None for row in self.rows)

    def _of(self, received: DispatchedTokens[FlatLayout]) -> int:
        return self._number[id(received.layout)]

    def _watched(self, pending: AsyncWork[T], name: str) -> Watched[T]:
        self.diary.append(name)
        return Watched(pending, name, self.diary)


def make_chunk(
    recompute: frozenset[RecomputeModule] = frozenset(),
    dtype: torch.dtype = torch.float32,
    recorder: SpanRecorder = NULL_RECORDER,
) -> tuple[Chunk, WatchedExchange]:
    model = Model(CONFIG)
    initialize_weights(model, seed=0)
    watched = WatchedExchange(ProcessGroups.create(Topology(), 0, timedelta(seconds=1)), CONFIG.n_routed_experts)
    return Chunk(model, watched, dtype, recorder=recorder, recompute=recompute), watched


def window() -> tuple[Tensor, Tensor]:
    tokens_BW = torch.randint(0, CONFIG.vocab_size, (2, LENGTH + 2), generator=torch.Generator().manual_seed(4))
    return tokens_BW, torch.ones_like(tokens_BW, dtype=torch.bool)
