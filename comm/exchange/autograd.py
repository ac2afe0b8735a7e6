"""Token dispatcher as differentiable functions, for an MoE layer under plain autograd.

    rows_RD, gates_R, received = dispatch(exchange, tokens_TD, gates_TK, experts_TK)
    out_RD = my_experts(rows_RD, received.rows_per_expert_L) * gates_R[:, None]
    out_TD = combine(exchange, out_RD, received)

Each call waits for its exchange: to compute while tokens travel, use the operations of `TokenExchange` themselves.

Letters: T local tokens, K experts per token, D hidden size, R rows received by this rank.
"""

from typing import Any, TypeVar

from torch import Tensor
from torch.autograd import Function

from ..trace import ExchangeLabel
from .api import UNLABELED, DispatchedTokens, TokenExchange

Layout = TypeVar("Layout")


def dispatch(
    exchange: TokenExchange[Layout],
    tokens_TD: Tensor,
    gates_TK: Tensor,
    experts_TK: Tensor,
    label: ExchangeLabel = UNLABELED,
) -> tuple[Tensor, Tensor, DispatchedTokens[Layout]]:
    """Send each token to the ranks of its K experts, which are int64 numbers over all experts of the group.

    Return the rows [R, D] of this rank's experts, sorted by expert, the gate of each row [R], and what `combine` needs,
    with the number of rows of each expert. Collective over the group, and so is its backward: either all ranks
    differentiate through it or none. Gradients reach `tokens_TD` and `gates_TK`, also on a rank that receives no row.
    """
    rows_RD, gates_R, received = _Dispatch.apply(  # type: ignore[no-untyped-call]
        exchange, tokens_TD, gates_TK, experts_TK, label
    )
    return rows_RD, gates_R, received


def combine(exchange: TokenExchange[Layout], rows_RD: Tensor, received: DispatchedTokens[Layout]) -> Tensor:
    """Send the experts' outputs back and return their sum for each token, [T, D]. Collective, like its backward.

    `rows_RD` are in the order of `dispatch`; multiply them by the gates before this sum.
    """
    out_TD: Tensor = _Combine.apply(exchange, rows_RD, received)  # type: ignore[no-untyped-call]
    return out_TD


class _Dispatch(Function):
    @staticmethod
    def forward(
        ctx: Any,
        exchange: TokenExchange[Layout],
        tokens_TD: Tensor,
        gates_TK: Tensor,
        experts_TK: Tensor,
        label: ExchangeLabel,
    ) -> tuple[Tensor, Tensor, DispatchedTokens[Layout]]:
        received = exchange.dispatch(tokens_TD, gates_TK, experts_TK, label).wait()
        ctx.exchange, ctx.received = exchange, received.without_rows()
        return received.rows_RD, received.gate_weights_R, ctx.received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_RD, grad_gates_R, _ = grads
        grad_TD, grad_gates_TK = ctx.exchange.dispatch_backward(grad_RD, grad_gates_R, ctx.received).wait()
        return None, grad_TD, grad_gates_TK, None, None


class _Combine(Function):
    @staticmethod
    def forward(
        ctx: Any, exchange: TokenExchange[Layout], rows_RD: Tensor, received: DispatchedTokens[Layout]
    ) -> Tensor:
        ctx.exchange, ctx.received = exchange, received
        return exchange.combine(rows_RD, received).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.exchange.combine_backward(grads[0], ctx.received).wait(), None
