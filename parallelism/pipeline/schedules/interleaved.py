"""Interleaved 1F1B: several stages a rank in a loop, for a bubble that is smaller by their number."""

from __future__ import annotations

from ..placement import Placement
from ..writer import RankWriter


def interleaved(writer: RankWriter, rank: int, placement: Placement, micro_batches: int) -> None:
    """Micro-batches go round in groups of `ranks`: a group passes chunk 0, then chunk 1, … (Narayanan et al. 2021)."""
    ranks, chunks = placement.ranks, placement.chunks
    total = micro_batches * chunks
    # Two forwards for each rank to come: a micro-batch's way to the end and its gradient's way back take that long.
    warm_up = min(2 * (ranks - 1 - rank) + (chunks - 1) * ranks, total)

    def chunk(turn: int) -> int:
        return turn // ranks % chunks

    for turn in range(warm_up):
        writer.forward(chunk(turn))
    for turn in range(total):
        if turn < total - warm_up:
            writer.forward(chunk(turn + warm_up))
        writer.backward(chunks - 1 - chunk(turn))
