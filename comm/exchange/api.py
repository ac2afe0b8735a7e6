"""The token exchange: what every all-to-all between the routers and the experts has to offer.

Letters: T tokens of this rank, K experts a token, D hidden width, R rows received by this rank, L experts on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from ..async_comm import AsyncWork, TwoPartWork
from ..fp8 import QuantizedRows
from ..trace import ExchangeLabel
from .permutation import TokenCounts

Layout = TypeVar("Layout")


@dataclass(frozen=True)
class DispatchedTokens(Generic[Layout]):
    """The rows for the experts of this rank, grouped by expert, and the way back."""

    rows_RD: Tensor
    gate_weights_R: Tensor
    """Gate weight of each row: it multiplies the row on the expert's side, so that combine is a plain sum."""
    rows_per_expert_L: tuple[int, ...]
    token_counts: TokenCounts
    label: ExchangeLabel
    layout: Layout
    """What the exchange that made this needs to send results back. Nobody else looks inside."""
    quantized_rows: QuantizedRows | None = None
    """The same rows as they crossed, where they were asked for like this; `rows_RD` is then a `stand_in`."""

    def without_rows(self) -> DispatchedTokens[Layout]:
        """The way back alone: enough for the three operations that follow, once the experts have the rows."""
        nothing = self.rows_RD.new_empty(0)
        return replace(self, rows_RD=nothing, gate_weights_R=nothing, quantized_rows=None)


class TokenExchange(Protocol[Layout]):
    """Four operations. Each returns at once; the communication advances while the caller computes.

    A dispatch makes the host wait once, for the sizes of everything, and not before it proceeds; the other three never
    do.

    dispatch_backward is a combine and combine_backward is a dispatch that reuses the layout: no sizes are exchanged
    again. Every rank of the expert-parallel group calls the same operations in the same order, also with zero tokens.
    """

    def dispatch(
        self,
        tokens_TD: Tensor,
        weights_TK: Tensor,
        experts_TK: Tensor,
        label: ExchangeLabel,
        *,
        keep_quantized: bool = False,
    ) -> TwoPartWork[DispatchedTokens[Layout]]:
        """Send each token to the ranks of its K experts. `experts_TK` are int64 indices over all experts.

        The first part exchanges sizes, the second sends the tokens.

        `as_tiles`: rows that cross in FP8 shall stay in it, because nothing else is made of them.
        """
        ...

    def combine(self, rows_RD: Tensor, received: DispatchedTokens[Layout]) -> AsyncWork[Tensor]:
        """Send the experts' results back and sum those of each token: tokens_TD."""
        ...

    def combine_backward(self, grad_TD: Tensor, received: DispatchedTokens[Layout]) -> AsyncWork[Tensor]:
        """Gradient of combine: each row receives its token's gradient: grad_RD."""
        ...

    def dispatch_backward(
        self, grad_RD: Tensor, grad_weights_R: Tensor, received: DispatchedTokens[Layout]
    ) -> AsyncWork[tuple[Tensor, Tensor]]:
        """Gradient of dispatch: (grad_TD, summed over each token's rows, and grad_weights_TK)."""
        ...
