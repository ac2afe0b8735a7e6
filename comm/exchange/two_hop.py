"""Token dispatcher of the report (§3.2.2): a token is sent to a node at most once, then forwarded inside it.

A token goes to the rank with the sender's local rank (the same rail) in each node that holds one of its experts, and
from there once to each rank that holds one. Sums come back in reverse: a rank sums the outputs of its experts, the
forwarding rank those of its node, the token's rank those of all nodes.

Letters: T local tokens, K experts per token, D hidden size, L experts on this rank, P ranks of the group, N nodes,
G ranks of a node, S sizes for each rank, V rows that arrived from the nodes, U rows that arrived from this node's ranks
(one per token and rank), R rows for the experts, W numbers of metadata per row, X rows in general, B bytes per message.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from ..fp8 import nan_placeholder
from ..trace import ExchangeCall
from .api import DispatchedTokens, TokenExchange
from .buffer_bytes import ExchangeBufferBytes
from .permutation import AllToAllStage, Permutation, TokenCounts, bincount_on_device, build_destination_mask
from .wire_format import RowCodec, WireFormat, empty_metadata, pack_columns, unpack_column, unpack_columns


@dataclass(frozen=True)
class TwoHopLayout:
    """Layout of one dispatch: permutations and row counts of both all-to-alls on this rank."""

    to_nodes: Permutation
    inter_node: AllToAllStage
    to_ranks: Permutation
    intra_node: AllToAllStage
    to_experts: Permutation
    choice_of_row_R: Tensor
    """Index of each row among all U·K choices, where its gate weight is."""
    top_k: int


@dataclass(frozen=True)
class _Sizes:
    """Row counts of both all-to-alls, as numbers on the host."""

    to_nodes_N: tuple[int, ...]
    from_nodes_N: tuple[int, ...]
    to_ranks_G: tuple[int, ...]
    from_ranks_G: tuple[int, ...]
    rows_per_expert_L: tuple[int, ...]
    rank_pairs: tuple[int]


class TwoHopExchange(TokenExchange[TwoHopLayout]):
    """`TokenExchange` over ranks that are spread evenly over nodes."""

    @override
    def _dispatch(
        self, call: ExchangeCall, tokens_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, keep_quantized: bool
    ) -> Callable[[], DispatchedTokens[TwoHopLayout]]:
        mask_TN, sizes = self._count_rows(call, experts_TK)
        return lambda: self._send_tokens(call, tokens_TD, weights_TK, experts_TK, keep_quantized, mask_TN, sizes())

    @override
    def _combine(self, call: ExchangeCall, layout: TwoHopLayout, rows_RD: Tensor) -> Tensor:
        no_metadata = empty_metadata(layout.to_experts.first_slot_X)
        return self._combine_rows(call, self._config.combine, rows_RD, layout, no_metadata)[0]

    @override
    def _combine_backward(self, call: ExchangeCall, layout: TwoHopLayout, grad_TD: Tensor) -> Tensor:
        # Encoded once and forwarded as bytes: the rank in between neither dequantizes nor rounds again.
        wire = self._codec(self._config.combine_backward, grad_TD)
        payload_TB, size = layout.to_nodes.permute(wire.encode(grad_TD)), wire.payload_bytes_per_row
        payload_VB = self._copy_for_ranks(layout.to_ranks, layout.inter_node.dispatch(call, payload_TB, size))
        return layout.to_experts.permute(wire.decode(layout.intra_node.dispatch(call, payload_VB, size)))

    @override
    def _dispatch_backward(
        self, call: ExchangeCall, layout: TwoHopLayout, grad_RD: Tensor, grad_weights_R: Tensor
    ) -> tuple[Tensor, Tensor]:
        # The gradient of each gate has its own column, zero on all other rows: the sums on the way back are exact.
        grad_UK = grad_weights_R.new_zeros((len(layout.to_experts.first_slot_X), layout.top_k))
        grad_UK.view(-1)[layout.choice_of_row_R] = grad_weights_R
        return self._combine_rows(call, self._config.dispatch_backward, grad_RD, layout, grad_UK)

    def _send_tokens(
        self,
        call: ExchangeCall,
        tokens_TD: Tensor,
        weights_TK: Tensor,
        experts_TK: Tensor,
        keep_quantized: bool,
        mask_TN: Tensor,
        sizes: _Sizes,
    ) -> DispatchedTokens[TwoHopLayout]:
        wire = self._codec(self._config.dispatch, tokens_TD)
        # Expert numbers travel with the row, because the forwarding rank and the expert's rank sort by them. int32
        # halves their bytes.
        numbers_TK = experts_TK.to(torch.int32)
        columns = wire.message_columns(numbers_TK, weights_TK)
        message_TB = pack_columns(wire.encode(tokens_TD), numbers_TK, weights_TK)

        to_nodes = Permutation.from_destination_mask(mask_TN, sum(sizes.to_nodes_N))
        inter_node = AllToAllStage(self._inter_node, self.traffic, sizes.to_nodes_N, sizes.from_nodes_N)
        message_VB = inter_node.dispatch(call, to_nodes.permute(message_TB), wire.payload_bytes_per_row)

        mask_VG = build_destination_mask(
            self._local_rank_of_choice(unpack_column(message_VB, columns, 1)), self._intra_node.size
        )
        to_ranks = Permutation.from_destination_mask(mask_VG, sum(sizes.to_ranks_G))
        intra_node = AllToAllStage(self._intra_node, self.traffic, sizes.to_ranks_G, sizes.from_ranks_G)
        payload_UB, experts_UK, weights_UK = unpack_columns(
            intra_node.dispatch(call, self._copy_for_ranks(to_ranks, message_VB), wire.payload_bytes_per_row), columns
        )
        choice_of_row_R, to_experts = self._sort_by_expert(experts_UK, sum(sizes.rows_per_expert_L))
        if keep_quantized and wire.format is WireFormat.FP8:
            quantized = wire.unpack_quantized(payload_UB, to_experts.permute)
            rows_RD = nan_placeholder(quantized.values_XD, wire.dtype)
        else:
            quantized, rows_RD = None, to_experts.permute(wire.decode(payload_UB))
        tokens, top_k = experts_TK.shape
        return DispatchedTokens(
            rows_RD=rows_RD,
            gate_weights_R=weights_UK.flatten()[choice_of_row_R],
            rows_per_expert_L=sizes.rows_per_expert_L,
            token_counts=TokenCounts(tokens, tokens * top_k, sizes.rank_pairs[0], sum(sizes.to_nodes_N)),
            label=call.label,
            layout=TwoHopLayout(to_nodes, inter_node, to_ranks, intra_node, to_experts, choice_of_row_R, top_k),
            quantized_rows=quantized,
        )

    def _combine_rows(
        self, call: ExchangeCall, format_name: str, rows_RD: Tensor, layout: TwoHopLayout, metadata_UW: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Send rows and metadata back; return the sums of both for each token."""
        wire = self._codec(format_name, rows_RD)

        def combine_stage(
            stage: AllToAllStage, permutation: Permutation, sums_XD: Tensor, metadata_XW: Tensor
        ) -> tuple[Tensor, Tensor]:
            """Send sums one stage towards the tokens in the wire format and sum them in FP32 at least."""
            if stage.is_local:
                return permutation.unpermute_and_sum(sums_XD), permutation.unpermute_and_sum(metadata_XW)
            message_XB = stage.combine(
                call, pack_columns(wire.encode(sums_XD), metadata_XW), wire.payload_bytes_per_row
            )
            payload_XB, metadata_XW = unpack_columns(message_XB, wire.message_columns(metadata_XW))
            return permutation.unpermute_and_sum(wire.decode(payload_XB)), permutation.unpermute_and_sum(metadata_XW)

        sums_UD = layout.to_experts.unpermute_and_sum(rows_RD)
        sums_VD, metadata_VW = combine_stage(layout.intra_node, layout.to_ranks, sums_UD, metadata_UW)
        sums_TD, metadata_TW = combine_stage(layout.inter_node, layout.to_nodes, sums_VD, metadata_VW)
        return sums_TD.to(rows_RD.dtype), metadata_TW.to(metadata_UW.dtype)

    def _count_rows(self, call: ExchangeCall, experts_TK: Tensor) -> tuple[Tensor, Callable[[], _Sizes]]:
        """Exchange the row counts of both all-to-alls; return the nodes of each token and what waits for the counts."""
        # Each rank gets from each other one: the tokens for this node, for each rank of the node and for each local
        # expert. The first two matter only to the rank on the sender's rail. One small all-to-all over the whole group
        # in place of one per stage: the host waits once.
        nodes, node_size, local_experts = self._inter_node.size, self._intra_node.size, self._local_experts
        mask_TP, mask_TN = self._destination_masks(experts_TK)
        to_ranks_NG = mask_TP.sum(dim=0).view(nodes, node_size)
        sent_PS = torch.cat(
            (
                mask_TN.sum(dim=0)[:, None].repeat_interleave(node_size, dim=0),
                to_ranks_NG.repeat_interleave(node_size, dim=0),
                bincount_on_device(experts_TK, self._num_experts).view(-1, local_experts),
            ),
            dim=1,
        )
        received_PS = self._exchange_sizes(call, sent_PS)
        received_NGS = received_PS.view(nodes, node_size, -1)
        place = self._intra_node.group_rank
        sums = (
            mask_TN.sum(dim=0),
            received_NGS[:, place, 0],
            received_NGS[:, place, 1 : 1 + node_size].sum(dim=0),
            received_NGS[:, :, 1 + place].sum(dim=0),
            received_PS[:, 1 + node_size :].sum(dim=0),
            mask_TP.sum()[None],
        )
        lengths, numbers = tuple(len(part) for part in sums), self._worker.copy_to_host_async(torch.cat(sums))

        def wait() -> _Sizes:
            """Wait for the numbers: the only wait of the host in a dispatch."""
            return _Sizes(*(tuple(part.tolist()) for part in numbers.wait().split(lengths)))

        return mask_TN, wait

    def _codec(self, format_name: str, rows_XD: Tensor) -> RowCodec:
        """Return the codec of `format_name`; a single rank sends nothing and must round nothing."""
        return RowCodec(
            WireFormat.NATIVE if self._group.size == 1 else WireFormat(format_name), rows_XD.shape[1], rows_XD.dtype
        )

    def _copy_for_ranks(self, to_ranks: Permutation, rows_VB: Tensor) -> Tensor:
        """Return one copy of a row for each rank of this node that needs it."""
        return rows_VB if self._intra_node.size == 1 else to_ranks.permute(rows_VB)

    def _local_rank_of_choice(self, experts_VK: Tensor) -> Tensor:
        """Return the local rank of each choice's expert; negative for experts of other nodes."""
        node_experts = self._intra_node.size * self._local_experts
        place_VK = (experts_VK - self._inter_node.group_rank * node_experts) // self._local_experts
        return place_VK.masked_fill(experts_VK // node_experts != self._inter_node.group_rank, -1).to(torch.int64)

    def _sort_by_expert(self, experts_UK: Tensor, rows: int) -> tuple[Tensor, Permutation]:
        """Return the choices of local experts, sorted by expert, and the permutation from arrived rows to them."""
        local = self._local_experts
        expert_UK = experts_UK - self._group.group_rank * local
        is_here_UK = (expert_UK >= 0) & (expert_UK < local)
        # Choices of other ranks sort behind the local ones and are cut off: no size has to be read from the device.
        order = torch.argsort(expert_UK.masked_fill(~is_here_UK, local).flatten(), stable=True)
        choice_of_row_R = order[:rows]
        return choice_of_row_R, Permutation.from_row_indices(
            choice_of_row_R // experts_UK.shape[1], is_here_UK.sum(dim=1)
        )


class TwoHopBufferBytes(ExchangeBufferBytes):
    """Bytes of the operations of a `TwoHopExchange`."""

    @property
    def rows_sent(self) -> float:
        """Rows sent once to each rank that holds an expert of the token."""
        # Expected number of different ranks among K experts drawn independently: each rank is missed by all K with
        # probability (1 - 1/P)^K.
        ranks = self.shape.ep_size
        return self.shape.tokens * ranks * (1 - (1 - 1 / ranks) ** self.shape.top_k)

    @property
    def rows_returned(self) -> float:
        """One row per token and rank: a rank sums the outputs of its experts."""
        return self.rows_sent

    def _dispatch_bytes(self, codec: RowCodec, *, gate: int, in_fp8: bool) -> float:
        # Live together: the messages sent, the messages received, their rows, and the rows sorted by expert.
        payload, decoded = codec.payload_bytes_per_row, self.expert_row_bytes if codec.changes_dtype else 0.0
        sorted_rows = self.dispatched_row_bytes if in_fp8 else self.expert_row_bytes + decoded
        return self.rows_sent * (2 * (payload + gate) + payload) + sorted_rows
