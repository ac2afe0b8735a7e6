"""Schedules whose micro-batches enter at rank 0 and leave at the last: GPipe, 1F1B, interleaved 1F1B and ZB-H1."""

from collections.abc import Iterator

from ..placement import StagePlacement
from ..program import Op, OpAndChunks

_F, _B, _I, _W = (Op.F, 0), (Op.B, 0), (Op.I, 0), (Op.W,)


def gpipe(rank: int, placement: StagePlacement, micro_batches: int) -> Iterator[OpAndChunks]:
    """Write GPipe: all forwards, then all backwards; keeps the activations of all micro-batches (Huang et al. 2019)."""
    yield from [_F] * micro_batches
    yield from [_B] * micro_batches


def one_f_one_b(rank: int, placement: StagePlacement, micro_batches: int) -> Iterator[OpAndChunks]:
    """Write 1F1B: one forward, one backward, after a warm-up of P - 1 - r forwards (PipeDream-Flush, 2021)."""
    # The gradient of the first micro-batch needs P - 1 - r ranks there and back; more forwards would only hold memory.
    warm_up = min(placement.ranks - 1 - rank, micro_batches)
    yield from [_F] * warm_up
    yield from [_F, _B] * (micro_batches - warm_up)
    yield from [_B] * warm_up


def zb_h1(rank: int, placement: StagePlacement, micro_batches: int) -> Iterator[OpAndChunks]:
    """Write ZB-H1: 1F1B that sends input gradients before it computes weight gradients (Qi et al. 2023).

    Every rank needs the memory of 1F1B's first rank: P - r forwards and r weight gradients are pending on rank r.
    """
    # Rank r runs its weight gradients r micro-batches late. All ranks wait for the gradients of the last one, which is
    # therefore the one that delays most.
    warm_up = min(placement.ranks - 1 - rank, micro_batches)
    yield from [_F] * warm_up
    for micro_batch in range(micro_batches):
        if micro_batch < micro_batches - warm_up:
            yield _F
        yield _I
        if micro_batch >= rank:
            yield _W
    yield from [_W] * min(rank, micro_batches)


def interleaved_1f1b(rank: int, placement: StagePlacement, micro_batches: int) -> Iterator[OpAndChunks]:
    """Write interleaved 1F1B: groups of P micro-batches pass chunk 0, then chunk 1, … (Narayanan et al. 2021)."""
    # The bubble is that of 1F1B divided by the number of chunks, for as many times the P2P messages.
    ranks, chunks = placement.ranks, placement.chunks_per_rank
    total = micro_batches * chunks
    # Two forwards for each later rank: the micro-batch's path to the end and its gradient's path back take that long.
    warm_up = min(2 * (ranks - 1 - rank) + (chunks - 1) * ranks, total)
    forwards = [(Op.F, turn // ranks % chunks) for turn in range(total)]
    yield from forwards[:warm_up]
    for turn, (_, chunk) in enumerate(forwards):
        if turn + warm_up < total:
            yield forwards[turn + warm_up]
        yield Op.B, chunks - 1 - chunk
