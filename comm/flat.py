"""The baseline and the oracle: one all-to-all in which every (token, expert) copy crosses the wire.

Letters: T tokens of this rank, K experts a token, D hidden width, E experts in all, L experts on this rank, P ranks of
the group, N = T·K copies sent by this rank, R rows received by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .exchange import Received
from .groups import Group
from .pending import Pending, Worker
from .traffic import Traffic


@dataclass(frozen=True)
class FlatLayout:
    """Where each copy went."""

    copy_of_slot_N: Tensor
    """The copies (token · K + k) in the order in which they are sent: by expert, so by rank too."""
    token_of_slot_N: Tensor
    """The token of each of them."""
    slot_of_copy_N: Tensor
    """The inverse of `copy_of_slot_N`."""
    top_k: int
    sent_P: tuple[int, ...]
    received_P: tuple[int, ...]
    wire_of_row_R: Tensor
    """Rows arrive by rank, then expert, and are kept by expert, then rank: the wire position of each kept row."""
    row_of_wire_R: Tensor
    """The inverse."""


class FlatExchange:
    """`TokenExchange` over one expert-parallel group. Expert e lives on rank e // L of the group."""

    def __init__(self, group: Group, experts: int, worker: Worker, traffic: Traffic) -> None:
        self._group = group
        self._experts = experts
        self._worker = worker
        self._traffic = traffic

    def dispatch(self, tokens_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Pending[Received[FlatLayout]]:
        """See `TokenExchange`."""

        def work() -> Received[FlatLayout]:
            layout, rows_per_expert_L = self._exchange_sizes(experts_TK)
            rows_RD = self._forth("dispatch", tokens_TD.index_select(0, layout.token_of_slot_N), layout)
            weights_R = self._forth("dispatch", weights_TK.reshape(-1)[layout.copy_of_slot_N], layout)
            return Received(rows_RD, weights_R, rows_per_expert_L, layout)

        return self._worker.submit(work)

    def combine(self, rows_RD: Tensor, received: Received[FlatLayout]) -> Pending[Tensor]:
        """See `TokenExchange`."""
        return self._worker.submit(lambda: self._sum_copies("combine", rows_RD, received.layout))

    def combine_backward(self, grad_TD: Tensor, received: Received[FlatLayout]) -> Pending[Tensor]:
        """See `TokenExchange`."""
        layout = received.layout
        return self._worker.submit(
            lambda: self._forth("combine_backward", grad_TD.index_select(0, layout.token_of_slot_N), layout)
        )

    def dispatch_backward(
        self, grad_RD: Tensor, grad_weights_R: Tensor, received: Received[FlatLayout]
    ) -> Pending[tuple[Tensor, Tensor]]:
        """See `TokenExchange`."""
        layout = received.layout

        def work() -> tuple[Tensor, Tensor]:
            grad_TD = self._sum_copies("dispatch_backward", grad_RD, layout)
            grad_weights_N = self._back("dispatch_backward", grad_weights_R, layout)
            return grad_TD, grad_weights_N[layout.slot_of_copy_N].view(-1, layout.top_k)

        return self._worker.submit(work)

    def _exchange_sizes(self, experts_TK: Tensor) -> tuple[FlatLayout, tuple[int, ...]]:
        experts_N = experts_TK.reshape(-1)
        copy_of_slot_N = torch.argsort(experts_N, stable=True)
        sent_PL = torch.bincount(experts_N, minlength=self._experts).view(self._group.size, -1)
        received_PL = sent_PL
        if self._group.size > 1:
            one_each = [1] * self._group.size
            received_PL = torch.empty_like(sent_PL)
            self._all_to_all("sizes", received_PL, sent_PL, one_each, one_each)
        rows_per_expert_L = received_PL.sum(dim=0)
        wire_of_row_R = _rows_by_expert(received_PL)
        layout = FlatLayout(
            copy_of_slot_N=copy_of_slot_N,
            token_of_slot_N=copy_of_slot_N // experts_TK.shape[1],
            slot_of_copy_N=_inverse(copy_of_slot_N),
            top_k=experts_TK.shape[1],
            sent_P=tuple(sent_PL.sum(dim=1).tolist()),
            received_P=tuple(received_PL.sum(dim=1).tolist()),
            wire_of_row_R=wire_of_row_R,
            row_of_wire_R=_inverse(wire_of_row_R),
        )
        return layout, tuple(rows_per_expert_L.tolist())

    def _forth(self, operation: str, copies: Tensor, layout: FlatLayout) -> Tensor:
        """Copies in sending order, [N] or [N, D], to rows by expert, [R] or [R, D]."""
        if self._group.size == 1:  # already by expert
            return copies
        wire = copies.new_empty((sum(layout.received_P), *copies.shape[1:]))
        self._all_to_all(operation, wire, copies, layout.received_P, layout.sent_P)
        return wire.index_select(0, layout.wire_of_row_R)

    def _back(self, operation: str, rows: Tensor, layout: FlatLayout) -> Tensor:
        """Rows by expert, [R] or [R, D], to copies in sending order, [N] or [N, D]."""
        if self._group.size == 1:
            return rows
        copies = rows.new_empty((sum(layout.sent_P), *rows.shape[1:]))
        self._all_to_all(
            operation, copies, rows.index_select(0, layout.row_of_wire_R), layout.sent_P, layout.received_P
        )
        return copies

    def _sum_copies(self, operation: str, rows_RD: Tensor, layout: FlatLayout) -> Tensor:
        """Bring rows back and sum the K copies of each token, in the order of its K experts whatever the layout."""
        copies_ND = self._back(operation, rows_RD, layout)
        return F.embedding_bag(layout.slot_of_copy_N.view(-1, layout.top_k), copies_ND, mode="sum")

    def _all_to_all(
        self, operation: str, output: Tensor, send: Tensor, output_sizes: Sequence[int], send_sizes: Sequence[int]
    ) -> None:
        """One all-to-all over the group; sizes in rows for each rank."""
        row_bytes = send.element_size() * send.shape[1:].numel()
        self._traffic.count(operation, self._group, [rows * row_bytes for rows in send_sizes])
        dist.all_to_all_single(
            output, send.contiguous(), list(output_sizes), list(send_sizes), group=self._group.handle
        )


def _rows_by_expert(received_PL: Tensor) -> Tensor:
    """Wire positions (by rank, then expert) in the order by expert, then rank."""
    ranks, local_experts = received_PL.shape
    segment_of_wire = torch.arange(ranks * local_experts, device=received_PL.device).repeat_interleave(
        received_PL.reshape(-1)
    )
    expert_of_wire = segment_of_wire % local_experts
    return torch.argsort(expert_of_wire, stable=True)


def _inverse(permutation: Tensor) -> Tensor:
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(permutation.numel(), device=permutation.device)
    return inverse
