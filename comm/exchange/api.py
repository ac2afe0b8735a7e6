"""`TokenExchange`, the interface of every token dispatcher.

Letters: T local tokens, K experts per token, D hidden size, R rows received by this rank, L experts on this rank.
"""

from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from ..async_comm import AsyncWork, TwoPartWork
from ..fp8 import QuantizedRows
from ..trace import ExchangeLabel
from .permutation import TokenCounts

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


class TokenExchange(Protocol[Layout]):
    """Four asynchronous operations; the communication advances while the caller computes.

    dispatch_backward is a combine and combine_backward is a dispatch that reuses the layout: no sizes are exchanged
    again. Every rank of the expert-parallel group calls the same operations in the same order, also with zero tokens.
    A dispatch makes the host wait once, for the sizes, when its second part is launched; the others never do.
    """

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
        ...

    def combine(self, rows_RD: Tensor, received: DispatchedTokens[Layout]) -> AsyncWork[Tensor]:
        """Send the experts' outputs back and return their sum for each token, [T, D]."""
        ...

    def combine_backward(self, grad_TD: Tensor, received: DispatchedTokens[Layout]) -> AsyncWork[Tensor]:
        """Return the gradient of combine, [R, D]: each row receives the gradient of its token."""
        ...

    def dispatch_backward(
        self, grad_RD: Tensor, grad_weights_R: Tensor, received: DispatchedTokens[Layout]
    ) -> AsyncWork[tuple[Tensor, Tensor]]:
        """Return the gradients of dispatch: grad_TD, summed over each token's rows, and grad_weights_TK."""
        ...
