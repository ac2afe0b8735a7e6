"""DualPipe and DualPipeV: micro-batches from both ends of the ranks, each forward overlapped with another's backward.

V3 report §3.2.1, figure 5. DualPipe holds two copies of the model, one for each direction. DualPipeV is one half of
it, folded: a rank holds stages r and 2P - 1 - r. Both have the same program on a rank: its *own* chunk is the one whose
micro-batches reach it first, the *other* chunk's micro-batches reach it after the turn.
"""

from ..placement import StagePlacement
from ..program import RankProgramWriter


def dualpipe(writer: RankProgramWriter, rank: int, placement: StagePlacement, micro_batches: int) -> None:
    """Write DualPipe: ranks r and P - 1 - r mirror each other; the two middle ranks are the turn of both halves.

    P is even; N is even and at least 2 P.
    """
    # Ranks are mirrored, so P is even. Each direction has N / 2 micro-batches and needs P to fill the pipeline.
    half = placement.ranks // 2
    from_end = min(rank, placement.ranks - 1 - rank)
    own = 0 if rank < half else 1
    _eight_steps(writer, own, beyond=half - 1 - from_end, until=from_end + 1, micro_batches=micro_batches // 2)


def dualpipev(writer: RankProgramWriter, rank: int, placement: StagePlacement, micro_batches: int) -> None:
    """Write DualPipeV: the last rank is the turn and corresponds to both middle ranks of DualPipe.

    P is at least 1 and N at least 2 P; odd numbers are allowed.
    """
    # Nothing is halved, so odd numbers work. On one rank steps 1, 3, 5 and 7 are empty, and there is no bubble.
    _eight_steps(writer, own=0, beyond=placement.ranks - 1 - rank, until=rank + 1, micro_batches=micro_batches)


def _eight_steps(writer: RankProgramWriter, own: int, beyond: int, until: int, micro_batches: int) -> None:
    """Write the eight steps of a rank with `beyond` ranks between it and the turn, the `until`-th from the end.

    `micro_batches` are those of one chunk.
    """
    # The steps and their counts are those of DeepSeek's dualpipe.py and dualpipev.py.
    other = 1 - own
    # 1, 2: fill the pipeline; the other chunk's first micro-batch arrives when one has gone to the turn and back.
    for _ in range(2 * beyond):
        writer.append_forward(own)
    for _ in range(until):
        writer.append_forward(own)
        writer.append_forward(other)
    # 3: gradients come back from the turn. Each is sent before its weight gradients are computed.
    for _ in range(beyond):
        writer.append_input_gradient(other)
        writer.append_weight_gradient()
        writer.append_forward(other)
    # 4: the steady state. At the turn the first pair runs as F and B: the backward needs nothing from a neighbor, and
    # all other ranks wait for its gradient.
    for pair in range(micro_batches - 2 * (beyond + until) + until):
        if pair == 0 and beyond == 0:
            writer.append_forward(own)
            writer.append_backward(other)
        else:
            writer.append_forward_backward(own, other)
        writer.append_forward_backward(other, own)
    # 5: the own chunk has no forwards left.
    for _ in range(beyond):
        writer.append_backward(other)
        writer.append_forward_backward(other, own)
    # 6: backwards only; the second half of them send their gradients first and leave weight gradients for the gaps.
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
