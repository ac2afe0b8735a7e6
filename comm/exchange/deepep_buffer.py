"""The size of DeepEP's communication buffer, by the formula of its own source. Not yet run on hardware.

Source: DeepEP 2.1.0 at commit dd758ca, `ElasticBuffer::calculate_buffer_size` (csrc/elastic/buffer.hpp), `TokenLayout`
and `WorkspaceLayout` (deep_ep/include/deep_ep/common/layout.cuh), for its defaults `allow_hybrid_mode=True` and
`allow_multiple_reduction=True`. NCCL registers the buffer as a window, so no allocator of torch sees it.
"""

from __future__ import annotations

from dataclasses import dataclass

_ROW_STEP = 32
"""Bytes to which each part of a row is rounded up, for TMA."""
_BUFFER_STEP = 2**21
"""Bytes to which buffer and workspace are rounded up."""
_CHANNELS = 8 * 160
"""The most channels: 8 on each of 160 SMs. Rows on their way between nodes have a slot more for each."""
_RANKS, _EXPERTS, _SESSIONS = 1024, 2048, 33
"""What the workspace has counters for, whatever is asked: ranks, experts, and gatherings under way with one more."""


@dataclass(frozen=True)
class DeepEPBufferShape:
    """What DeepEP's buffers are made for; every rank of a group has to say the same."""

    max_tokens_per_rank: int
    """The most that one rank dispatches at once."""
    hidden_size: int
    top_k: int


def deepep_buffer_bytes(shape: DeepEPBufferShape, nodes: int, ranks_per_node: int, *, fp8_dispatch: bool) -> int:
    """Return the bytes that one rank's buffer and workspace take of its GPU.

    The buffer serves a dispatch or a combine, whichever needs more. For DeepSeek-V3 (4096 tokens of 7168, top-8, 8
    nodes of 8) that is a combine: 3.77 GB in which the ranks of a node receive, 0.47 GB to receive from other nodes,
    and 0.62 GB to send to them.
    """
    dispatched, combined = _dispatched_row(shape, fp8=fp8_dispatch), _combined_row(shape)
    if nodes == 1:
        dispatch = ranks_per_node * shape.max_tokens_per_rank * dispatched
        combine = min(ranks_per_node, shape.top_k) * shape.max_tokens_per_rank * combined
    else:
        of_node = nodes * shape.max_tokens_per_rank
        dispatch = (
            ranks_per_node * of_node + shape.max_tokens_per_rank + nodes * (shape.max_tokens_per_rank + _CHANNELS)
        ) * dispatched
        inside, between = min(ranks_per_node, shape.top_k), min(nodes, shape.top_k)
        combine = (
            inside * of_node + between * shape.max_tokens_per_rank + nodes * (shape.max_tokens_per_rank + _CHANNELS)
        ) * combined
    return _up(max(dispatch, combine), _BUFFER_STEP) + _up(_workspace(), _BUFFER_STEP)


def _dispatched_row(shape: DeepEPBufferShape, *, fp8: bool) -> int:
    """Values; in FP8 an FP32 scale for each 32, more than are sent; of each expert index, gate and slot; the source."""
    values = shape.hidden_size * (1 if fp8 else 2)
    scales = -(-shape.hidden_size // 32) * 4 if fp8 else 0
    return _up(values, _ROW_STEP) + _up(scales, _ROW_STEP) + _up(shape.top_k * 12 + 4, _ROW_STEP)


def _combined_row(shape: DeepEPBufferShape) -> int:
    """Values in BF16; of each expert index and gate."""
    return _up(shape.hidden_size * 2, _ROW_STEP) + _up(shape.top_k * 8, _ROW_STEP)


def _workspace() -> int:
    """Counters and signals: within a node in 64 bits, between nodes in 32, and one of each a channel and rank."""
    both = _RANKS + _EXPERTS
    counts = both * 8 + 2 * both * 8 + _RANKS * 4 + 2 * both * 4
    return 16 + counts + _RANKS * _CHANNELS * (8 + 4) + 32 + _SESSIONS * _RANKS * 4


def _up(size: int, step: int) -> int:
    return -(-size // step) * step
