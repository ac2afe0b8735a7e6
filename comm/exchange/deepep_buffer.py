"""Size of DeepEP's communication buffer, by the formula of its source. Not yet run on hardware.

Source: DeepEP 2.1.0 at commit dd758ca, `ElasticBuffer::calculate_buffer_size` (csrc/elastic/buffer.hpp), `TokenLayout`
and `WorkspaceLayout` (deep_ep/include/deep_ep/common/layout.cuh), for its defaults `allow_hybrid_mode=True` and
`allow_multiple_reduction=True`. NCCL registers the buffer as a window, so torch's allocator does not count it.
"""

from dataclasses import dataclass

from ..units import ceil_div, round_up
from .two_hop import TwoHopBufferBytes
from .wire_format import RowCodec

_GATE = 4  # bytes: gates of DeepEP are FP32
_ROW_STEP = 32
"""Alignment of each part of a row in bytes, for TMA."""
_BUFFER_STEP = 2**21
"""Alignment of buffer and workspace in bytes."""
_CHANNELS = 8 * 160
"""Most channels: 8 on each of 160 SMs. The buffers between nodes have one more slot for each."""
_RANKS, _EXPERTS, _SESSIONS = 1024, 2048, 33
"""Fixed sizes of the workspace's counters: ranks, experts, concurrent all-gathers plus one."""


@dataclass(frozen=True)
class DeepEPBufferShape:
    """Sizes that DeepEP's buffers are allocated for; equal on every rank of a group."""

    max_tokens_per_rank: int
    """Most tokens that one rank dispatches in one call."""
    hidden_size: int
    top_k: int


def deepep_buffer_bytes(shape: DeepEPBufferShape, nodes: int, ranks_per_node: int, *, fp8_dispatch: bool) -> int:
    """Return the bytes of GPU memory of one rank's buffer and workspace."""
    # Dispatch and combine share the buffer, so the larger one counts. For DeepSeek-V3 (4096 tokens of 7168, top-8,
    # 8 nodes of 8) that is combine: 3.77 GB to receive inside the node, 0.47 GB to receive from other nodes and 0.62 GB
    # to send to them.
    dispatched, combined = _dispatched_row(shape, fp8=fp8_dispatch), _combined_row(shape)
    if nodes == 1:
        dispatch = ranks_per_node * shape.max_tokens_per_rank * dispatched
        combine = min(ranks_per_node, shape.top_k) * shape.max_tokens_per_rank * combined
    else:
        rail_tokens = nodes * shape.max_tokens_per_rank
        dispatch = (
            ranks_per_node * rail_tokens + shape.max_tokens_per_rank + nodes * (shape.max_tokens_per_rank + _CHANNELS)
        ) * dispatched
        # Combine sums on the way: a token's results arrive from at most K ranks of a node and from at most K nodes.
        ranks_reduced, nodes_reduced = min(ranks_per_node, shape.top_k), min(nodes, shape.top_k)
        combine = (
            ranks_reduced * rail_tokens
            + nodes_reduced * shape.max_tokens_per_rank
            + nodes * (shape.max_tokens_per_rank + _CHANNELS)
        ) * combined
    return round_up(max(dispatch, combine), _BUFFER_STEP) + round_up(_workspace(), _BUFFER_STEP)


def _dispatched_row(shape: DeepEPBufferShape, *, fp8: bool) -> int:
    """Return the bytes of a dispatched row: values, scales, the index, gate and slot of each expert, the source."""
    # DeepEP reserves an FP32 scale for each 32 values; ours are one byte for each 128.
    values = shape.hidden_size * (1 if fp8 else 2)
    scales = ceil_div(shape.hidden_size, 32) * 4 if fp8 else 0
    return round_up(values, _ROW_STEP) + round_up(scales, _ROW_STEP) + round_up(shape.top_k * 12 + 4, _ROW_STEP)


def _combined_row(shape: DeepEPBufferShape) -> int:
    """Return the bytes of a combined row: BF16 values, and index and gate of each expert."""
    return round_up(shape.hidden_size * 2, _ROW_STEP) + round_up(shape.top_k * 8, _ROW_STEP)


def _workspace() -> int:
    """Return the bytes of counters and signals: 64 bits inside a node, 32 between nodes, per channel and rank."""
    both = _RANKS + _EXPERTS
    counts = both * 8 + 2 * both * 8 + _RANKS * 4 + 2 * both * 4
    return 16 + counts + _RANKS * _CHANNELS * (8 + 4) + 32 + _SESSIONS * _RANKS * 4


class DeepEPAllocatorBytes(TwoHopBufferBytes):
    """Bytes of the operations of a `DeepEPExchange` in torch's allocator: its messages are in DeepEP's buffer."""

    def _dispatch_bytes(self, codec: RowCodec, *, gate: int, in_fp8: bool) -> float:
        # DeepEP reads the encoded tokens and writes rows and gates (FP32) to separate tensors.
        rows, payload = self.shape.rows, codec.payload_bytes_per_row
        gates = rows * _GATE if gate else 0.0
        if not codec.changes_dtype:
            return gates + (self.dispatched_row_bytes if in_fp8 else rows * payload)
        received = self.dispatched_row_bytes if in_fp8 else rows * payload + self.expert_row_bytes
        return gates + self.shape.tokens * payload + received

    def _combine_bytes(self, codec: RowCodec, *, gate: int) -> float:
        # DeepEP reads rows and writes sums, both in BF16 (2 bytes), and one gate for each of a token's K experts.
        shape = self.shape
        gates = shape.tokens * shape.top_k * _GATE if gate else 0.0
        size: float = 2 * shape.tokens
        if shape.dtype.itemsize != 2:  # rows and sums are converted
            size += 2 * shape.rows + shape.dtype.itemsize * shape.tokens
        return gates + size * shape.hidden_size
