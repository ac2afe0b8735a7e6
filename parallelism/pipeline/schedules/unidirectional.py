"""Schedules whose micro-batches enter at rank 0 and leave at the last: GPipe, 1F1B, interleaved 1F1B and ZB-H1."""

from ..placement import StagePlacement
from ..program import RankProgramWriter


def gpipe(writer: RankProgramWriter, rank: int, placement: StagePlacement, micro_batches: int) -> None:
    """Write GPipe: all forwards, then all backwards; keeps the activations of all micro-batches (Huang et al. 2019)."""
    for _ in range(micro_batches):
        writer.append_forward()
    for _ in range(micro_batches):
        writer.append_backward()


def one_f_one_b(writer: RankProgramWriter, rank: int, placement: StagePlacement, micro_batches: int) -> None:
    """Write 1F1B: one forward, one backward, after a warm-up of P - 1 - r forwards (PipeDream-Flush, 2021)."""
    # The gradient of the first micro-batch needs P - 1 - r ranks there and back; more forwards would only hold memory.
    warm_up = min(placement.ranks - 1 - rank, micro_batches)
    for _ in range(warm_up):
        writer.append_forward()
    for _ in range(micro_batches - warm_up):
        writer.append_forward()
        writer.append_backward()
    for _ in range(warm_up):
        writer.append_backward()


def zb_h1(writer: RankProgramWriter, rank: int, placement: StagePlacement, micro_batches: int) -> None:
    """Write ZB-H1: 1F1B that sends input gradients before it computes weight gradients (Qi et al. 2023).

    Every rank needs the memory of 1F1B's first rank: P - r forwards and r weight gradients are pending on rank r.
    """
    # Rank r runs its weight gradients r micro-batches late. All ranks wait for the gradients of the last one, which is
    # therefore the one that delays most.
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
    """Write interleaved 1F1B: groups of P micro-batches pass chunk 0, then chunk 1, … (Narayanan et al. 2021)."""
    # The bubble is that of 1F1B divided by the number of chunks, for as many times the P2P messages.
    ranks, chunks = placement.ranks, placement.chunks_per_rank
    total = micro_batches * chunks
    # Two forwards for each later rank: the micro-batch's path to the end and its gradient's path back take that long.
    warm_up = min(2 * (ranks - 1 - rank) + (chunks - 1) * ranks, total)

    def chunk(turn: int) -> int:
        return turn // ranks % chunks

    for turn in range(warm_up):
        writer.append_forward(chunk(turn))
    for turn in range(total):
        if turn < total - warm_up:
            writer.append_forward(chunk(turn + warm_up))
        writer.append_backward(chunks - 1 - chunk(turn))
