"""Reference token dispatcher: one all-to-all in which every (token, expert) copy crosses the wire.

Letters: T local tokens, K experts per token, D hidden size, E experts in all, L experts on this rank, P ranks of the
group, M nodes, N = T·K copies sent by this rank, R rows received by it, A rows in order of arrival, W numbers of
metadata per row, B bytes of a message.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from ..fp8 import QuantizedRows, nan_placeholder
from ..host_transfer import AsyncHostCopy
from ..trace import ExchangeCall
from .api import DispatchedTokens, TokenExchange
from .buffer_bytes import ExchangeBufferBytes
from .permutation import AllToAllStage, Permutation, TokenCounts, bincount_on_device
from .wire_format import RowCodec, WireFormat, empty_metadata, pack_columns, unpack_column, unpack_columns


@dataclass(frozen=True)
class FlatLayout:
    """Layout of one dispatch: the rank, row and expert of each copy."""

    to_experts: Permutation
    """Permutation of tokens to their copies, sorted by expert and therefore by rank."""
    all_to_all_stage: AllToAllStage
    choice_of_copy_N: Tensor
    """Index of each copy among all T·K choices."""
    sort_by_expert: Permutation
    """Permutation of rows from order of arrival (by rank, then expert) to order by expert, then rank."""
    top_k: int


class FlatExchange(TokenExchange[FlatLayout]):
    """`TokenExchange` in one all-to-all."""

    @override
    def _dispatch(
        self, call: ExchangeCall, tokens_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, keep_quantized: bool
    ) -> Callable[[], DispatchedTokens[FlatLayout]]:
        received_PL, sums = self._count_rows(call, experts_TK)

        def second() -> DispatchedTokens[FlatLayout]:
            layout, rows_per_expert_L, token_counts = self._plan(experts_TK, received_PL, sums.wait().tolist())
            weights_N1 = weights_TK.reshape(-1, 1).index_select(0, layout.choice_of_copy_N)
            wire = RowCodec(WireFormat(self._config.dispatch), tokens_TD.shape[1], tokens_TD.dtype)
            if keep_quantized and wire.format is WireFormat.FP8 and not layout.all_to_all_stage.is_local:
                quantized, weights_R1 = self._dispatch_quantized(call, wire, tokens_TD, layout, weights_N1)
                rows_RD = nan_placeholder(quantized.values_XD, wire.dtype)
            else:
                quantized = None
                rows_RD, weights_R1 = self._dispatch_rows(call, wire, tokens_TD, layout, weights_N1)
            return DispatchedTokens(
                rows_RD, weights_R1.flatten(), rows_per_expert_L, token_counts, call.label, layout, quantized
            )

        return second

    @override
    def _combine(self, call: ExchangeCall, layout: FlatLayout, rows_RD: Tensor) -> Tensor:
        return self._combine_rows(call, self._config.combine, rows_RD, layout, empty_metadata(rows_RD))[0]

    @override
    def _combine_backward(self, call: ExchangeCall, layout: FlatLayout, grad_TD: Tensor) -> Tensor:
        wire = RowCodec(WireFormat(self._config.combine_backward), grad_TD.shape[1], grad_TD.dtype)
        return self._dispatch_rows(call, wire, grad_TD, layout, empty_metadata(layout.choice_of_copy_N))[0]

    @override
    def _dispatch_backward(
        self, call: ExchangeCall, layout: FlatLayout, grad_RD: Tensor, grad_weights_R: Tensor
    ) -> tuple[Tensor, Tensor]:
        metadata_R1 = grad_weights_R[:, None]
        grad_TD, grad_N1 = self._combine_rows(call, self._config.dispatch_backward, grad_RD, layout, metadata_R1)
        grad_weights_TK = torch.empty_like(grad_N1)
        grad_weights_TK[layout.choice_of_copy_N] = grad_N1
        return grad_TD, grad_weights_TK.view(-1, layout.top_k)

    def _count_rows(self, call: ExchangeCall, experts_TK: Tensor) -> tuple[Tensor, AsyncHostCopy]:
        """Return the rows from each rank for each local expert, [P, L], and a host copy of the sums for `_plan`."""
        sent_PL = bincount_on_device(experts_TK, self._num_experts).view(self._group.size, -1)
        received_PL = self._exchange_sizes(call, sent_PL)
        mask_TP, mask_TM = self._destination_masks(experts_TK)
        sums = (sent_PL.sum(dim=1), received_PL.sum(dim=1), received_PL.sum(dim=0), mask_TP.sum(), mask_TM.sum())
        # One copy of all sums: each read on the host makes it wait for the device, so a dispatch has one.
        return received_PL, self._worker.copy_to_host_async(torch.cat([x.reshape(-1) for x in sums]))

    def _plan(
        self, experts_TK: Tensor, received_PL: Tensor, numbers: list[int]
    ) -> tuple[FlatLayout, tuple[int, ...], TokenCounts]:
        """Return the layout, the rows per local expert and the token counts, from the exchanged sizes."""
        ranks, (tokens, top_k) = self._group.size, experts_TK.shape
        sent_P, received_P = numbers[:ranks], numbers[ranks : 2 * ranks]
        rows_per_expert_L, (rank_pairs, node_pairs) = numbers[2 * ranks : -2], numbers[-2:]

        # Stable: copies for one expert keep the order of tokens, so that sums have the same bits in every run.
        choice_of_copy_N = torch.argsort(experts_TK.reshape(-1), stable=True)
        wire_of_row_R = _rows_by_expert(received_PL, sum(received_P))
        layout = FlatLayout(
            to_experts=Permutation.from_row_indices(choice_of_copy_N // top_k, experts_TK.new_full((tokens,), top_k)),
            all_to_all_stage=AllToAllStage(self._group, self.traffic, tuple(sent_P), tuple(received_P)),
            choice_of_copy_N=choice_of_copy_N,
            sort_by_expert=Permutation.from_row_indices(wire_of_row_R, torch.ones_like(wire_of_row_R)),
            top_k=top_k,
        )
        return layout, tuple(rows_per_expert_L), TokenCounts(tokens, tokens * top_k, rank_pairs, node_pairs)

    def _dispatch_rows(
        self, call: ExchangeCall, wire: RowCodec, tokens_TD: Tensor, layout: FlatLayout, metadata_NW: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Send tokens to the experts; return rows and metadata sorted by expert."""
        if layout.all_to_all_stage.is_local:  # already by expert
            return layout.to_experts.permute(tokens_TD), metadata_NW
        message_AB = self._send_tokens(call, wire, tokens_TD, layout, metadata_NW)
        payload_RB, metadata_RW = unpack_columns(
            layout.sort_by_expert.permute(message_AB), wire.message_columns(metadata_NW)
        )
        return wire.decode(payload_RB), metadata_RW

    def _dispatch_quantized(
        self, call: ExchangeCall, wire: RowCodec, tokens_TD: Tensor, layout: FlatLayout, metadata_NW: Tensor
    ) -> tuple[QuantizedRows, Tensor]:
        """Send tokens to the experts; return the rows in FP8, without dequantizing them, and the metadata."""
        message_AB = self._send_tokens(call, wire, tokens_TD, layout, metadata_NW)
        metadata_AW = unpack_column(message_AB, wire.message_columns(metadata_NW), 1)
        return wire.unpack_quantized(message_AB, layout.sort_by_expert.permute), layout.sort_by_expert.permute(
            metadata_AW
        )

    def _send_tokens(
        self, call: ExchangeCall, wire: RowCodec, tokens_TD: Tensor, layout: FlatLayout, metadata_NW: Tensor
    ) -> Tensor:
        """Send tokens and metadata; return the messages in order of arrival, [A, B]."""
        # Tokens are encoded before they are copied: quantizing T rows costs less than quantizing T·K.
        message_NB = pack_columns(layout.to_experts.permute(wire.encode(tokens_TD)), metadata_NW)
        return layout.all_to_all_stage.dispatch(call, message_NB, wire.payload_bytes_per_row)

    def _combine_rows(
        self, call: ExchangeCall, format_name: str, rows_RD: Tensor, layout: FlatLayout, metadata_RW: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Send rows and metadata back; return the sum of each token's rows and the metadata of each copy."""
        if layout.all_to_all_stage.is_local:
            return layout.to_experts.unpermute_and_sum(rows_RD).to(rows_RD.dtype), metadata_RW
        wire = RowCodec(WireFormat(format_name), rows_RD.shape[1], rows_RD.dtype)
        message_AB = pack_columns(wire.encode(rows_RD), metadata_RW).index_select(
            0, layout.sort_by_expert.copy_of_slot_C
        )
        message_NB = layout.all_to_all_stage.combine(call, message_AB, wire.payload_bytes_per_row)
        payload_NB, metadata_NW = unpack_columns(message_NB, wire.message_columns(metadata_RW))
        return layout.to_experts.unpermute_and_sum(wire.decode(payload_NB)).to(rows_RD.dtype), metadata_NW


def _rows_by_expert(received_PL: Tensor, rows: int) -> Tensor:
    """Return the positions of arrival (by rank, then expert), sorted by expert, then rank."""
    ranks, local_experts = received_PL.shape
    segments = torch.arange(ranks * local_experts, device=received_PL.device)
    # `output_size` is known: without it the host would wait for the device to learn the length.
    segment_of_wire_A = segments.repeat_interleave(received_PL.reshape(-1), output_size=rows)
    return torch.argsort(segment_of_wire_A % local_experts, stable=True)


def routing_table_bytes(tokens: int, top_k: int, rows: float) -> float:
    """Return the bytes of a `FlatLayout` of `rows` received rows: indices of rows sent and received, and inverses."""
    # int64: 3 K + 1 numbers per token and 3 per received row.
    return torch.int64.itemsize * (tokens * (3 * top_k + 1) + 3 * rows)


class FlatBufferBytes(ExchangeBufferBytes):
    """Bytes of the operations of a `FlatExchange`."""

    @property
    def rows_sent(self) -> float:
        """T·K copies."""
        return float(self.shape.tokens * self.shape.top_k)

    @property
    def rows_returned(self) -> float:
        """R rows."""
        return self.shape.rows

    def _dispatch_bytes(self, codec: RowCodec, *, gate: int, in_fp8: bool) -> float:
        # Messages sent are freed before the received ones are sorted. FP8 rows that stay FP8 are sorted without a copy
        # of the messages.
        rows, message = self.shape.rows, codec.payload_bytes_per_row + gate
        gateless = rows * codec.payload_bytes_per_row if gate else 0.0
        decoded = self.expert_row_bytes if codec.changes_dtype else 0.0
        placed = self.dispatched_row_bytes if in_fp8 else rows * message + gateless + decoded
        return rows * message + max(self.rows_sent * message, placed)
