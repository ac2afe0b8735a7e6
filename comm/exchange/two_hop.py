"""The report's all-to-all (§3.2.2): each token crosses between nodes once per node, then is forwarded inside it.

A token goes to the rank with its own place in each node that holds one of its experts (the same rail), and from there
once to each rank that holds one. Sums come back the same way: a rank sums the results of its experts, the forwarding
rank those of its node, the token's own rank those of all nodes.

Letters: T tokens of this rank, K experts a token, D hidden width, L experts on this rank, N nodes, G ranks of a node,
V rows that arrived from the nodes, U rows that arrived from this node's ranks (one a token and rank), R rows for the
experts, W numbers beside a row, X rows anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..async_comm import AsyncCommunicator, AsyncWork, TwoPartWork
from ..fp8 import nan_placeholder
from ..groups import ProcessGroups
from ..host_transfer import AsyncHostCopy
from ..trace import ExchangeCall, ExchangeLabel
from ..traffic import TrafficCounter
from .api import DispatchedTokens
from .config import ExchangeConfig
from .permutation import AllToAllStage, Permutation, TokenCounts, bincount_on_device, build_destination_mask
from .wire_format import RowCodec, WireFormat, empty_metadata, pack_columns, unpack_column, unpack_columns


@dataclass(frozen=True)
class TwoHopLayout:
    """The way of this rank's tokens, and of those that come through it or to it."""

    to_nodes: Permutation
    inter_node: AllToAllStage
    to_ranks: Permutation
    intra_node: AllToAllStage
    to_experts: Permutation
    choice_of_row_R: Tensor
    """Which of all U·K choices each row for an expert is: the place of its gate weight."""
    top_k: int


@dataclass(frozen=True)
class _Sizes:
    """What the one exchange of sizes tells this rank, as numbers on the host."""

    to_nodes_N: tuple[int, ...]
    from_nodes_N: tuple[int, ...]
    to_ranks_G: tuple[int, ...]
    from_ranks_G: tuple[int, ...]
    rows_per_expert_L: tuple[int, ...]
    rank_visits: int


@dataclass(frozen=True)
class _Counted:
    """The exchange of sizes, which is under way."""

    visits_TN: Tensor
    numbers: AsyncHostCopy
    lengths: tuple[int, ...]
    """How many of the numbers each field of `_Sizes` takes."""

    def sizes(self) -> _Sizes:
        """Wait for the numbers; nothing else of a dispatch holds the host."""
        parts = [tuple(part.tolist()) for part in self.numbers.wait().split(self.lengths)]
        return _Sizes(parts[0], parts[1], parts[2], parts[3], parts[4], parts[5][0])


class TwoHopExchange:
    """`TokenExchange` over one expert-parallel group, spread evenly over nodes. Expert e lives on its rank e // L."""

    def __init__(
        self,
        groups: ProcessGroups,
        num_experts: int,
        async_communicator: AsyncCommunicator,
        traffic: TrafficCounter,
        config: ExchangeConfig,
    ) -> None:
        self._group = groups.ep
        self._between = groups.ep_inter_node
        self._inside = groups.ep_intra_node
        self._local_experts = num_experts // groups.ep.size
        self._worker = async_communicator
        self._traffic = traffic
        self._config = config

    def dispatch(
        self,
        tokens_TD: Tensor,
        weights_TK: Tensor,
        experts_TK: Tensor,
        label: ExchangeLabel,
        *,
        keep_quantized: bool = False,
    ) -> TwoPartWork[DispatchedTokens[TwoHopLayout]]:
        """See `TokenExchange`."""
        call = ExchangeCall("dispatch", label)

        def first() -> Callable[[], DispatchedTokens[TwoHopLayout]]:
            counted = self._exchange_sizes(call, experts_TK)
            return lambda: self._send_tokens(call, tokens_TD, weights_TK, experts_TK, keep_quantized, counted)

        return self._worker.submit_two_part(str(call), first, (tokens_TD, weights_TK, experts_TK))

    def combine(self, rows_RD: Tensor, received: DispatchedTokens[TwoHopLayout]) -> AsyncWork[Tensor]:
        """See `TokenExchange`."""
        call, layout = ExchangeCall("combine", received.label), received.layout

        def work() -> Tensor:
            nothing = empty_metadata(layout.to_experts.first_slot_X)
            return self._back(call, self._config.combine, rows_RD, layout, nothing)[0]

        return self._worker.submit(str(call), work, (rows_RD,))

    def combine_backward(self, grad_TD: Tensor, received: DispatchedTokens[TwoHopLayout]) -> AsyncWork[Tensor]:
        """See `TokenExchange`."""
        call, layout = ExchangeCall("combine_backward", received.label), received.layout

        def work() -> Tensor:
            wire = self._wire(self._config.combine_backward, grad_TD)
            payload_VB = layout.inter_node.dispatch(
                call, layout.to_nodes.permute(wire.encode(grad_TD)), wire.payload_bytes_per_row
            )
            payload_UB = layout.intra_node.dispatch(
                call, self._for_ranks(layout.to_ranks, payload_VB), wire.payload_bytes_per_row
            )
            return layout.to_experts.permute(wire.decode(payload_UB))

        return self._worker.submit(str(call), work, (grad_TD,))

    def dispatch_backward(
        self, grad_RD: Tensor, grad_weights_R: Tensor, received: DispatchedTokens[TwoHopLayout]
    ) -> AsyncWork[tuple[Tensor, Tensor]]:
        """See `TokenExchange`."""
        call, layout = ExchangeCall("dispatch_backward", received.label), received.layout

        def work() -> tuple[Tensor, Tensor]:
            # Each gate has a place of its own beside the row, empty elsewhere: the sums on the way back are exact.
            grad_UK = grad_weights_R.new_zeros((len(layout.to_experts.first_slot_X), layout.top_k))
            grad_UK.view(-1)[layout.choice_of_row_R] = grad_weights_R
            return self._back(call, self._config.dispatch_backward, grad_RD, layout, grad_UK)

        return self._worker.submit(str(call), work, (grad_RD, grad_weights_R))

    def _send_tokens(
        self,
        call: ExchangeCall,
        tokens_TD: Tensor,
        weights_TK: Tensor,
        experts_TK: Tensor,
        as_tiles: bool,
        counted: _Counted,
    ) -> DispatchedTokens[TwoHopLayout]:
        sizes = counted.sizes()
        wire = self._wire(self._config.dispatch, tokens_TD)
        numbers_TK = experts_TK.to(torch.int32)
        columns = wire.message_columns(numbers_TK, weights_TK)
        message_TB = pack_columns(wire.encode(tokens_TD), numbers_TK, weights_TK)

        to_nodes = Permutation.from_destination_mask(counted.visits_TN, sum(sizes.to_nodes_N))
        between = AllToAllStage(self._between, self._traffic, sizes.to_nodes_N, sizes.from_nodes_N)
        message_VB = between.dispatch(call, to_nodes.permute(message_TB), wire.payload_bytes_per_row)

        visits_VG = build_destination_mask(self._rank_in_node(unpack_column(message_VB, columns, 1)), self._inside.size)
        to_ranks = Permutation.from_destination_mask(visits_VG, sum(sizes.to_ranks_G))
        inside = AllToAllStage(self._inside, self._traffic, sizes.to_ranks_G, sizes.from_ranks_G)
        payload_UB, experts_UK, weights_UK = unpack_columns(
            inside.dispatch(call, self._for_ranks(to_ranks, message_VB), wire.payload_bytes_per_row), columns
        )
        choice_of_row_R, to_experts = self._sort(experts_UK, sum(sizes.rows_per_expert_L))
        if as_tiles and wire.format is WireFormat.FP8:
            tiles = wire.unpack_quantized(payload_UB, to_experts.permute)
            rows_RD = nan_placeholder(tiles.values_XD, wire.dtype)
        else:
            tiles, rows_RD = None, to_experts.permute(wire.decode(payload_UB))
        tokens, top_k = experts_TK.shape
        return DispatchedTokens(
            rows_RD=rows_RD,
            gate_weights_R=weights_UK.flatten()[choice_of_row_R],
            rows_per_expert_L=sizes.rows_per_expert_L,
            token_counts=TokenCounts(tokens, tokens * top_k, sizes.rank_visits, sum(sizes.to_nodes_N)),
            label=call.label,
            layout=TwoHopLayout(to_nodes, between, to_ranks, inside, to_experts, choice_of_row_R, top_k),
            quantized_rows=tiles,
        )

    def _back(
        self, call: ExchangeCall, form: str, rows_RD: Tensor, layout: TwoHopLayout, beside_UW: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rows by expert, and numbers beside each arrived row, to the sums of both over each token's."""
        wire = self._wire(form, rows_RD)

        def home(hop: AllToAllStage, fan: Permutation, sums_XD: Tensor, beside_XW: Tensor) -> tuple[Tensor, Tensor]:
            """One hop towards the tokens: sums cross in the wire's format and are summed in FP32 at least."""
            if hop.is_local:
                return fan.unpermute_and_sum(sums_XD), fan.unpermute_and_sum(beside_XW)
            message_XB = hop.combine(call, pack_columns(wire.encode(sums_XD), beside_XW), wire.payload_bytes_per_row)
            payload_XB, beside_XW = unpack_columns(message_XB, wire.message_columns(beside_XW))
            return fan.unpermute_and_sum(wire.decode(payload_XB)), fan.unpermute_and_sum(beside_XW)

        sums_UD = layout.to_experts.unpermute_and_sum(rows_RD)
        sums_VD, beside_VW = home(layout.intra_node, layout.to_ranks, sums_UD, beside_UW)
        sums_TD, beside_TW = home(layout.inter_node, layout.to_nodes, sums_VD, beside_VW)
        return sums_TD.to(rows_RD.dtype), beside_TW.to(beside_UW.dtype)

    def _exchange_sizes(self, call: ExchangeCall, experts_TK: Tensor) -> _Counted:
        """Tell every rank of the group what it will have to receive, forward and compute.

        A rank is sent, by each other one: its tokens for this node, those for each rank of this node, and those for
        each expert of this rank. The first two matter only to the rank on the sender's rail.
        """
        nodes, node_size, local_experts = self._between.size, self._inside.size, self._local_experts
        visits_TP = build_destination_mask(experts_TK // local_experts, self._group.size)
        visits_TN = visits_TP.unflatten(1, (nodes, node_size)).any(dim=2)
        to_ranks_NG = visits_TP.sum(dim=0).view(nodes, node_size)
        sent_PS = torch.cat(
            (
                visits_TN.sum(dim=0)[:, None].repeat_interleave(node_size, dim=0),
                to_ranks_NG.repeat_interleave(node_size, dim=0),
                bincount_on_device(experts_TK, self._group.size * local_experts).view(-1, local_experts),
            ),
            dim=1,
        )
        received_PS = torch.empty_like(sent_PS)
        one_each = [1] * self._group.size
        self._traffic.count_metadata("sizes", self._group, [sent_PS[0].numel() * 8] * self._group.size)
        self._group.all_to_all(received_PS, sent_PS, one_each, one_each, f"sizes of {call}")

        received_NGS = received_PS.view(nodes, node_size, -1)
        place = self._inside.group_rank
        sums = (
            visits_TN.sum(dim=0),
            received_NGS[:, place, 0],
            received_NGS[:, place, 1 : 1 + node_size].sum(dim=0),
            received_NGS[:, :, 1 + place].sum(dim=0),
            received_PS[:, 1 + node_size :].sum(dim=0),
            visits_TP.sum()[None],
        )
        lengths = tuple(len(part) for part in sums)
        return _Counted(visits_TN, self._worker.copy_to_host_async(torch.cat(sums)), lengths)

    def _wire(self, form: str, rows_XD: Tensor) -> RowCodec:
        """A single rank has no wire, and rounds nothing for it."""
        return RowCodec(
            WireFormat.NATIVE if self._group.size == 1 else WireFormat(form), rows_XD.shape[1], rows_XD.dtype
        )

    def _for_ranks(self, to_ranks: Permutation, rows_VB: Tensor) -> Tensor:
        """The copies for the ranks of this node; a node of one rank gets the rows as they have arrived."""
        return rows_VB if self._inside.size == 1 else to_ranks.permute(rows_VB)

    def _rank_in_node(self, experts_VK: Tensor) -> Tensor:
        """The place in this node of each choice's rank; negative for experts of other nodes."""
        node_experts = self._inside.size * self._local_experts
        place_VK = (experts_VK - self._between.group_rank * node_experts) // self._local_experts
        return place_VK.masked_fill(experts_VK // node_experts != self._between.group_rank, -1).to(torch.int64)

    def _sort(self, experts_UK: Tensor, rows: int) -> tuple[Tensor, Permutation]:
        """The choices for this rank's experts, by expert, and the fan from arrived rows to them."""
        local = self._local_experts
        expert_UK = experts_UK - self._group.group_rank * local
        is_here_UK = (expert_UK >= 0) & (expert_UK < local)
        order = torch.argsort(expert_UK.masked_fill(~is_here_UK, local).flatten(), stable=True)
        choice_of_row_R = order[:rows]
        return choice_of_row_R, Permutation.from_row_indices(
            choice_of_row_R // experts_UK.shape[1], is_here_UK.sum(dim=1)
        )
