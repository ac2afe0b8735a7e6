"""Schedules whose micro-batches enter at rank 0 and leave at the last: GPipe, 1F1B, interleaved 1F1B and ZB1P.

Interleaved 1F1B has several stages a rank in a loop, for a bubble that is smaller by their number.
"""

from __future__ import annotations

from ..placement import StagePlacement
from ..program import RankProgramWriter


def gpipe(writer: RankProgramWriter, rank: int, placement: StagePlacement, micro_batches: int) -> None:
    """All forwards, then all backwards: the simplest, and the one that keeps every activation (Huang et al. 2019)."""
    for _ in range(micro_batches):
        writer.append_forward()
    for _ in range(micro_batches):
        writer.append_backward()


def one_f_one_b(writer: RankProgramWriter, rank: int, placement: StagePlacement, micro_batches: int) -> None:
    """One forward, one backward, after as many forwards as there are ranks to come (PipeDream-Flush, 2021)."""
    warm_up = min(placement.ranks - 1 - rank, micro_batches)
    for _ in range(warm_up):
        writer.append_forward()
    for _ in range(micro_batches - warm_up):
        writer.append_forward()
        writer.append_backward()
    for _ in range(warm_up):
        writer.append_backward()


def zb_h1(writer: RankProgramWriter, rank: int, placement: StagePlacement, micro_batches: int) -> None:
    """1F1B whose backward sends the input gradient on before it computes weight gradients (ZB-H1, Qi et al. 2023).

    Rank r runs its weight gradients r micro-batches late: the last rank, whose gradient all others wait for, catches up
    with the warm-up of the first. Rank r then has ranks - r forwards and r weight gradients open: the memory of 1F1B's
    first rank on every rank.
    """
    warm_up = min(placement.ranks - 1 - rank, micro_batches)
    for _ in range(warm_up):
        writer.append_forward()
    for micro_batch in range(micro_batches):
        if micro_batch < micro_batches - warm_up:
            writer.append_forward()
        writer.append_input_gradient()
        if micro_batch >= rank:
            writer.append_weight_gradient()
    for _ in range(min(rank, micro_batches)):
        writer.append_weight_gradient()


def interleaved_1f1b(writer: RankProgramWriter, rank: int, placement: StagePlacement, micro_batches: int) -> None:
    """Micro-batches go round in groups of `ranks`: a group passes chunk 0, then chunk 1, … (Narayanan et al. 2021)."""
    ranks, chunks = placement.ranks, placement.chunks_per_rank
    total = micro_batches * chunks
    # Two forwards for each rank to come: a micro-batch's way to the end and its gradient's way back take that long.
    warm_up = min(2 * (ranks - 1 - rank) + (chunks - 1) * ranks, total)

    def chunk(turn: int) -> int:
        return turn // ranks % chunks

    for turn in range(warm_up):
        writer.append_forward(chunk(turn))
    for turn in range(total):
        if turn < total - warm_up:
            writer.append_forward(chunk(turn + warm_up))
        writer.append_backward(chunks - 1 - chunk(turn))
