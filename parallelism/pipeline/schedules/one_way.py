"""Schedules with one stage a rank: GPipe, 1F1B and ZB1P. Micro-batches enter at rank 0 and leave at the last."""

from __future__ import annotations

from ..placement import Placement
from ..writer import RankWriter


def gpipe(writer: RankWriter, rank: int, placement: Placement, micro_batches: int) -> None:
    """All forwards, then all backwards: the simplest, and the one that keeps every activation (Huang et al. 2019)."""
    for _ in range(micro_batches):
        writer.forward()
    for _ in range(micro_batches):
        writer.backward()


def one_f_one_b(writer: RankWriter, rank: int, placement: Placement, micro_batches: int) -> None:
    """One forward, one backward, after as many forwards as there are ranks to come (PipeDream-Flush, 2021)."""
    warm_up = min(placement.ranks - 1 - rank, micro_batches)
    for _ in range(warm_up):
        writer.forward()
    for _ in range(micro_batches - warm_up):
        writer.forward()
        writer.backward()
    for _ in range(warm_up):
        writer.backward()


def zb1p(writer: RankWriter, rank: int, placement: Placement, micro_batches: int) -> None:
    """1F1B whose backward sends the input gradient on before it computes weight gradients (ZB-H1, Qi et al. 2023).

    Rank r runs its weight gradients r micro-batches late: the last rank, whose gradient all others wait for, catches up
    with the warm-up of the first. Rank r then has ranks - r forwards and r weight gradients open: the memory of 1F1B's
    first rank on every rank.
    """
    warm_up = min(placement.ranks - 1 - rank, micro_batches)
    for _ in range(warm_up):
        writer.forward()
    for micro_batch in range(micro_batches):
        if micro_batch < micro_batches - warm_up:
            writer.forward()
        writer.input_gradient()
        if micro_batch >= rank:
            writer.weight_gradient()
    for _ in range(min(rank, micro_batches)):
        writer.weight_gradient()
