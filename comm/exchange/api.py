"""`TokenExchange`, the interface of every token dispatcher.

Letters: T local tokens, K experts per token, D hidden size, R rows received by this rank, L experts on this rank,
P ranks of the group, N nodes, S sizes for each rank.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ..async_comm import AsyncCommunicator, AsyncWork, InlineCommunicator, TwoPartWork
from ..fp8 import QuantizedRows
from ..groups import ExpertGroups
from ..trace import ExchangeCall, ExchangeLabel
from ..traffic import TrafficCounter, TrafficKind
from .config import ExchangeConfig
from .permutation import TokenCounts, build_destination_mask

T = TypeVar("T")
Layout = TypeVar("Layout")
UNLABELED = ExchangeLabel("layer", 0)
"""Label of an exchange whose caller gives none: timelines and errors name every layer alike."""


@dataclass(frozen=True)
class DispatchedTokens(Generic[Layout]):
    """Rows for the experts of this rank, grouped by expert, and the layout to send results back."""

    rows_RD: Tensor
    gate_weights_R: Tensor
    """Gate weight of each row."""
    # The experts multiply by it before their down projection, so that combine is a plain sum, and so is its backward.
    rows_per_expert_L: tuple[int, ...]
    token_counts: TokenCounts
    label: ExchangeLabel
    layout: Layout
    """Layout of the dispatch, which only the exchange that returned it reads."""
    quantized_rows: QuantizedRows | None = None
    """The rows in FP8 if `keep_quantized` was asked for; `rows_RD` is then a `nan_placeholder`."""

    def without_rows(self) -> "DispatchedTokens[Layout]":
        """Return a copy without the rows: enough for the three operations that follow."""
        # A forward keeps this until its backward; the rows would be the largest part of what it keeps.
        nothing = self.rows_RD.new_empty(0)
        return replace(self, rows_RD=nothing, gate_weights_R=nothing, quantized_rows=None)


class TokenExchange(ABC, Generic[Layout]):
    """Four asynchronous operations; the communication advances while the caller computes.

    Expert e is on rank e // L of the expert-parallel group. dispatch_backward is a combine and combine_backward is a
    dispatch that reuses the layout: no sizes are exchanged again. Every rank of the group calls the same operations in
    the same order, also with zero tokens. A dispatch makes the host wait once, for the sizes, when its second part is
    launched; the others never do.
    """

    def __init__(
        self,
        groups: ExpertGroups,
        num_experts: int,
        async_communicator: AsyncCommunicator | None = None,
        traffic: TrafficCounter | None = None,
        config: ExchangeConfig | None = None,
    ) -> None:
        """Take by default a communicator that runs in the calling thread, and the configuration's defaults.

        `num_experts` is their number over all ranks, a multiple of the ranks.
        """
        self._group, self._inter_node, self._intra_node = groups.ep, groups.ep_inter_node, groups.ep_intra_node
        self._num_experts, self._local_experts = num_experts, num_experts // groups.ep.size
        self._worker = async_communicator or InlineCommunicator()
        self.traffic = traffic or TrafficCounter.by_nodes(groups)
        self._config = config or ExchangeConfig()

    def dispatch(
        self,
        tokens_TD: Tensor,
        weights_TK: Tensor,
        experts_TK: Tensor,
        label: ExchangeLabel = UNLABELED,
        *,
        keep_quantized: bool = False,
    ) -> TwoPartWork[DispatchedTokens[Layout]]:
        """Send each token to the ranks of its K experts. `experts_TK` are int64 indices over all experts.

        The first part exchanges sizes, the second sends the tokens. `keep_quantized` returns rows that cross in FP8 as
        `quantized_rows`, without dequantizing them.
        """
        call, inputs = ExchangeCall("dispatch", label), (tokens_TD, weights_TK, experts_TK)
        return self._worker.submit_two_part(str(call), partial(self._dispatch, call, *inputs, keep_quantized), inputs)

    def combine(self, rows_RD: Tensor, received: DispatchedTokens[Layout]) -> AsyncWork[Tensor]:
        """Send the experts' outputs back and return their sum for each token, [T, D]."""
        return self._submit("combine", received, self._combine, rows_RD)

    def combine_backward(self, grad_TD: Tensor, received: DispatchedTokens[Layout]) -> AsyncWork[Tensor]:
        """Return the gradient of combine, [R, D]: each row receives the gradient of its token."""
        return self._submit("combine_backward", received, self._combine_backward, grad_TD)

    def dispatch_backward(
        self, grad_RD: Tensor, grad_weights_R: Tensor, received: DispatchedTokens[Layout]
    ) -> AsyncWork[tuple[Tensor, Tensor]]:
        """Return the gradients of dispatch: grad_TD, summed over each token's rows, and grad_weights_TK."""
        return self._submit("dispatch_backward", received, self._dispatch_backward, grad_RD, grad_weights_R)

    def _submit(
        self, operation: str, received: DispatchedTokens[Layout], function: Callable[..., T], *inputs: Tensor
    ) -> AsyncWork[T]:
        call = ExchangeCall(operation, received.label)
        return self._worker.submit(str(call), partial(function, call, received.layout, *inputs), inputs)

    @abstractmethod
    def _dispatch(
        self, call: ExchangeCall, tokens_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, keep_quantized: bool
    ) -> Callable[[], DispatchedTokens[Layout]]:
        """Run the first part of `dispatch`; return the second."""

    @abstractmethod
    def _combine(self, call: ExchangeCall, layout: Layout, rows_RD: Tensor) -> Tensor: ...

    @abstractmethod
    def _combine_backward(self, call: ExchangeCall, layout: Layout, grad_TD: Tensor) -> Tensor: ...

    @abstractmethod
    def _dispatch_backward(
        self, call: ExchangeCall, layout: Layout, grad_RD: Tensor, grad_weights_R: Tensor
    ) -> tuple[Tensor, Tensor]: ...

    def _exchange_sizes(self, call: ExchangeCall, sent_PS: Tensor) -> Tensor:
        """Send row i of `sent_PS` to rank i; return what arrives from each rank, [P, S]."""
        one_each = [1] * self._group.size
        self.traffic.count("sizes", TrafficKind.METADATA, self._group, [sent_PS[0].nbytes] * self._group.size)
        return self._group.all_to_all(torch.empty_like(sent_PS), sent_PS, one_each, one_each, f"sizes of {call}")

    def _destination_masks(self, experts_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ranks [T, P] and the nodes [T, N] that hold an expert of each token, as booleans."""
        mask_TP = build_destination_mask(experts_TK // self._local_experts, self._group.size)
        return mask_TP, mask_TP.unflatten(1, (-1, self._intra_node.size)).any(dim=2)
