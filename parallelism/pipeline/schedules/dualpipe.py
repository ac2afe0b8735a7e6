"""DualPipe and DualPipeV: micro-batches from both ends of the ranks, each forward overlapped with another's backward.

V3 report §3.2.1, figure 5. DualPipe holds two copies of the model, one for each direction; DualPipeV is one half of
it, folded: its ranks hold a stage of the way up and one of the way down. To a rank both look the same: its *own* chunk
is the one whose micro-batches reach it first, the *other* chunk's come back to it from the far end.
"""

from __future__ import annotations

from ..placement import StagePlacement
from ..program import RankProgramWriter


def dualpipe(writer: RankProgramWriter, rank: int, placement: StagePlacement, micro_batches: int) -> None:
    """Ranks r and P - 1 - r mirror each other; the two middle ranks are the turn of both halves.

    P even, because ranks are mirrored; micro-batches even, one half for each direction, and 2 P at least, so that each
    direction has the P it takes to fill the pipeline.
    """
    half = placement.ranks // 2
    from_end = min(rank, placement.ranks - 1 - rank)
    own = 0 if rank < half else 1
    _eight_steps(writer, own, beyond=half - 1 - from_end, until=from_end + 1, micro_batches=micro_batches // 2)


def dualpipev(writer: RankProgramWriter, rank: int, placement: StagePlacement, micro_batches: int) -> None:
    """The turn is on the last rank, which stands for both middle ranks of DualPipe.

    Any number of ranks from 1 on and any number of micro-batches from 2 P on, odd ones too: nothing is halved. On one
    rank both chunks are local, steps 1, 3, 5 and 7 are empty, and there is no bubble.
    """
    _eight_steps(writer, own=0, beyond=placement.ranks - 1 - rank, until=rank + 1, micro_batches=micro_batches)


def _eight_steps(writer: RankProgramWriter, own: int, beyond: int, until: int, micro_batches: int) -> None:
    """`beyond` ranks lie between this one and the turn, it is the `until`-th from the end; `micro_batches` a chunk."""
    other = 1 - own
    # 1, 2: fill the pipeline; the other chunk's first micro-batch arrives after the way to the turn and back.
    for _ in range(2 * beyond):
        writer.append_forward(own)
    for _ in range(until):
        writer.append_forward(own)
        writer.append_forward(other)
    # 3: gradients come back from the turn. Each is passed on before its weight gradients are computed.
    for _ in range(beyond):
        writer.append_input_gradient(other)
        writer.append_weight_gradient()
        writer.append_forward(other)
    # 4: the steady state. At the turn the first pair runs one after the other: the backward needs nothing of a
    # neighbor, and its gradient is what all others wait for.
    for pair in range(micro_batches - 2 * (beyond + until) + until):
        if pair == 0 and beyond == 0:
            writer.append_forward(own)
            writer.append_backward(other)
        else:
            writer.append_forward_backward(own, other)
        writer.append_forward_backward(other, own)
    # 5: forwards of the other chunk run out.
    for _ in range(beyond):
        writer.append_backward(other)
        writer.append_forward_backward(other, own)
    # 6: backwards only; the second half of them pass their gradients on first and leave weight gradients for the gaps.
    for backward in range(2 * until):
        chunk = own if backward % 2 else other
        if backward < until:
            writer.append_backward(chunk)
        else:
            writer.append_input_gradient(chunk)
    # 7, 8: one weight gradient in each gap between the last gradients, then the rest.
    for _ in range(beyond):
        writer.append_weight_gradient()
        writer.append_input_gradient(own)
    for _ in range(until):
        writer.append_weight_gradient()
