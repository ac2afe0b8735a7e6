"""Where rows go: which copies are made of each, how many to whom, and the way back. Integers only, no row is touched.

Everything is vectorized and exact (int64); a layout made for dispatch serves the three operations that follow.

Letters: T tokens, K experts a token, X rows, M members (nodes, or ranks), C copies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..groups import Group
from ..trace import ExchangeCall
from ..traffic import TrafficCounter


@dataclass(frozen=True)
class Permutation:
    """Some copies of each row, in the order in which they are sent, and their sums back in the order of the rows."""

    row_of_copy_C: Tensor
    copy_of_slot_C: Tensor
    """The copies again, sorted by row: the copies of one row stand in neighboring slots."""
    first_slot_X: Tensor

    @staticmethod
    def from_row_indices(row_of_copy_C: Tensor, copies_of_row_X: Tensor) -> Permutation:
        """A fan of the copies in sending order; `copies_of_row_X` counts those of each row, 0 too."""
        return Permutation(
            row_of_copy_C=row_of_copy_C,
            copy_of_slot_C=torch.argsort(row_of_copy_C, stable=True),
            first_slot_X=copies_of_row_X.cumsum(0) - copies_of_row_X,
        )

    @staticmethod
    def from_destination_mask(visits_XM: Tensor, copies: int) -> Permutation:
        """One copy for each member that a row visits (bool), by member, then row. `copies` is how many there are."""
        row_of_copy_C = torch.nonzero_static(visits_XM.T, size=copies)[:, 1]
        return Permutation.from_row_indices(row_of_copy_C, visits_XM.sum(dim=1))

    def permute(self, rows: Tensor) -> Tensor:
        """[X, any] to [C, any]."""
        return rows.index_select(0, self.row_of_copy_C)

    def unpermute_and_sum(self, copies: Tensor) -> Tensor:
        """[C, any] to [X, any]: the sum of each row's copies, in one order always; FP32 at least, unlike what it sums.

        A row without copies is zero.
        """
        wide = copies.to(torch.promote_types(copies.dtype, torch.float32))
        if not wide.numel():
            return wide.new_zeros((len(self.first_slot_X), *copies.shape[1:]))
        return F.embedding_bag(self.copy_of_slot_C, wide, self.first_slot_X, mode="sum")


@dataclass(frozen=True)
class AllToAllStage:
    """One all-to-all, forth and back: how many rows this rank sends to and receives from each rank of a group."""

    group: Group
    traffic: TrafficCounter
    send_counts_M: tuple[int, ...]
    receive_counts_M: tuple[int, ...]

    @property
    def is_local(self) -> bool:
        """Whether the group is this rank alone, and nothing moves."""
        return self.group.size == 1

    def dispatch(self, call: ExchangeCall, messages_XB: Tensor, payload: int) -> Tensor:
        """uint8 [rows sent, bytes] to [rows received, bytes]; the first `payload` bytes of each are its row."""
        return self._move(call, messages_XB, payload, self.send_counts_M, self.receive_counts_M)

    def combine(self, call: ExchangeCall, messages_XB: Tensor, payload: int) -> Tensor:
        """The same in the opposite direction."""
        return self._move(call, messages_XB, payload, self.receive_counts_M, self.send_counts_M)

    def _move(
        self,
        call: ExchangeCall,
        messages_XB: Tensor,
        payload: int,
        sent_M: tuple[int, ...],
        received_M: tuple[int, ...],
    ) -> Tensor:
        if self.is_local:
            return messages_XB
        size = messages_XB.shape[1]
        self.traffic.count_payload(call.operation, self.group, [rows * payload for rows in sent_M])
        self.traffic.count_metadata(call.operation, self.group, [rows * (size - payload) for rows in sent_M])
        arrived_XB = messages_XB.new_empty((sum(received_M), size))
        return self.group.all_to_all(arrived_XB, messages_XB, received_M, sent_M, str(call))


@dataclass(frozen=True)
class TokenCounts:
    """What the routing of one layer's tokens means for the wires, over the tokens of this rank, padding included."""

    tokens: int
    token_expert_pairs: int
    """(token, expert) pairs."""
    token_rank_pairs: int
    """(token, rank) pairs: at least one expert of the token lives there."""
    token_node_pairs: int
    """(token, node) pairs."""

    def __add__(self, other: TokenCounts) -> TokenCounts:
        return TokenCounts(*(a + b for a, b in zip(self.as_tuple(), other.as_tuple(), strict=True)))

    def as_tuple(self) -> tuple[int, int, int, int]:
        """As plain numbers, to be summed over ranks."""
        return self.tokens, self.token_expert_pairs, self.token_rank_pairs, self.token_node_pairs


ZERO_TOKEN_COUNTS = TokenCounts(0, 0, 0, 0)


def build_destination_mask(member_of_choice_TK: Tensor, members: int) -> Tensor:
    """bool [T, M]: which members hold one of the token's choices or more. A negative choice is at none of them."""
    extra = member_of_choice_TK.masked_fill(member_of_choice_TK < 0, members)
    visits_TM = torch.zeros((len(extra), members + 1), dtype=torch.bool, device=extra.device)
    return visits_TM.scatter_(1, extra, True)[:, :members]


def bincount_on_device(choices: Tensor, bins: int) -> Tensor:
    """int64 [bins]: how often each number from 0 occurs. Unlike `torch.bincount` it never waits for a GPU."""
    flat = choices.flatten()
    return torch.zeros(bins, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))
