"""Gather and scatter indices of a token dispatch, and the row counts of its all-to-alls.

The permutations of a dispatch serve the three operations that follow it.

Letters: T tokens, K experts per token, X rows, M members (nodes, or ranks), C copies, B bytes of a message.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..groups import Group
from ..trace import ExchangeCall
from ..traffic import TrafficCounter, TrafficKind


@dataclass(frozen=True)
class Permutation:
    """Gather indices of copies of rows in sending order, and the scatter indices that sum them back."""

    row_of_copy_C: Tensor
    copy_of_slot_C: Tensor
    """Indices of the copies sorted by row: those of one row are in neighboring slots."""
    first_slot_X: Tensor

    @staticmethod
    def from_row_indices(row_of_copy_C: Tensor, copies_of_row_X: Tensor) -> "Permutation":
        """Build from the row of each copy in sending order and the number of copies of each row, which may be 0."""
        # Stable: the copies of a row keep their order, so that their sum has the same bits in every run.
        return Permutation(
            row_of_copy_C=row_of_copy_C,
            copy_of_slot_C=torch.argsort(row_of_copy_C, stable=True),
            first_slot_X=copies_of_row_X.cumsum(0) - copies_of_row_X,
        )

    @staticmethod
    def from_destination_mask(mask_XM: Tensor, copies: int) -> "Permutation":
        """Build one copy for each true entry of `mask_XM`, sorted by member, then row; `copies` is their number."""
        # `nonzero_static` with a known size: plain `nonzero` makes the host wait for the device.
        row_of_copy_C = torch.nonzero_static(mask_XM.T, size=copies)[:, 1]
        return Permutation.from_row_indices(row_of_copy_C, mask_XM.sum(dim=1))

    def permute(self, rows: Tensor) -> Tensor:
        """Copy rows [X, any] to [C, any] in sending order."""
        return rows.index_select(0, self.row_of_copy_C)

    def unpermute_and_sum(self, copies: Tensor) -> Tensor:
        """Sum the copies [C, any] of each row to [X, any] in FP32 at least; a row without copies is zero."""
        # BF16 sums of up to 8 expert outputs would lose bits. `embedding_bag` sums in a fixed order; `index_add_` on a
        # GPU uses atomics, whose order changes from run to run.
        wide = copies.to(torch.promote_types(copies.dtype, torch.float32))
        if not wide.numel():
            return wide.new_zeros((len(self.first_slot_X), *copies.shape[1:]))
        return F.embedding_bag(self.copy_of_slot_C, wide, self.first_slot_X, mode="sum")


@dataclass(frozen=True)
class AllToAllStage:
    """One all-to-all over a group: the rows that this rank sends to and receives from each rank in a dispatch."""

    group: Group
    traffic: TrafficCounter
    send_counts_M: tuple[int, ...]
    receive_counts_M: tuple[int, ...]

    @property
    def is_local(self) -> bool:
        """True if the group is this rank alone: no bytes move."""
        return self.group.size == 1

    def dispatch(self, call: ExchangeCall, messages_XB: Tensor, payload: int) -> Tensor:
        """Exchange messages, uint8 [rows sent, B] to [rows received, B]; the first `payload` bytes are the row."""
        return self._move(call, messages_XB, payload, self.send_counts_M, self.receive_counts_M)

    def combine(self, call: ExchangeCall, messages_XB: Tensor, payload: int) -> Tensor:
        """Exchange messages in the opposite direction of `dispatch`."""
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
        for kind, per_row in ((TrafficKind.PAYLOAD, payload), (TrafficKind.METADATA, size - payload)):
            self.traffic.count(call.operation, kind, self.group, [rows * per_row for rows in sent_M])
        arrived_XB = messages_XB.new_empty((sum(received_M), size))
        return self.group.all_to_all(arrived_XB, messages_XB, received_M, sent_M, str(call))


@dataclass(frozen=True)
class TokenCounts:
    """Numbers of pairs that one layer's routing sends, over the tokens of this rank, padding included."""

    tokens: int
    token_expert_pairs: int
    """(token, expert) pairs."""
    token_rank_pairs: int
    """(token, rank) pairs: the rank holds at least one expert of the token."""
    token_node_pairs: int
    """(token, node) pairs."""

    def __add__(self, other: "TokenCounts") -> "TokenCounts":
        return TokenCounts(*(a + b for a, b in zip(self.as_tuple(), other.as_tuple(), strict=True)))

    def as_tuple(self) -> tuple[int, int, int, int]:
        """Return the counts as plain numbers, which are summed over ranks."""
        return self.tokens, self.token_expert_pairs, self.token_rank_pairs, self.token_node_pairs


ZERO_TOKEN_COUNTS = TokenCounts(0, 0, 0, 0)


def build_destination_mask(member_of_choice_TK: Tensor, members: int) -> Tensor:
    """Return bool [T, M]: true where a member holds one of the token's choices. Negative choices are ignored."""
    # Negative choices go to an extra column, which is cut off: a boolean index would make the host wait for the device.
    extra = member_of_choice_TK.masked_fill(member_of_choice_TK < 0, members)
    mask_TM = torch.zeros((len(extra), members + 1), dtype=torch.bool, device=extra.device)
    return mask_TM.scatter_(1, extra, True)[:, :members]


def bincount_on_device(choices: Tensor, bins: int) -> Tensor:
    """Return int64 [bins]: how often each number from 0 occurs."""
    # `torch.bincount` reads the largest number on the host, which waits for the device.
    flat = choices.flatten()
    return torch.zeros(bins, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))
