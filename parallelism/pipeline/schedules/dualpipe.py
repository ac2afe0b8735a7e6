"""DualPipe and DualPipeV: micro-batches from both ends of the ranks, each forward overlapped with another's backward.

V3 report §3.2.1, figure 5. DualPipe holds two copies of the model, one for each direction. DualPipeV is one half of
it, folded: a rank holds stages r and 2P - 1 - r. Both have the same program on a rank: its *own* chunk is the one whose
micro-batches reach it first, the *other* chunk's micro-batches reach it after the turn.
"""

from collections.abc import Iterator

from ..placement import StagePlacement
from ..program import Op, OpAndChunks


def dualpipe(rank: int, placement: StagePlacement, micro_batches: int) -> Iterator[OpAndChunks]:
    """Write DualPipe: ranks r and P - 1 - r mirror each other; the two middle ranks are the turn of both halves.

    P is even; N is even and at least 2 P.
    """
    # Ranks are mirrored, so P is even. Each direction has N / 2 micro-batches and needs P to fill the pipeline.
    half = placement.ranks // 2
    from_end = min(rank, placement.ranks - 1 - rank)
    own = 0 if rank < half else 1
    return _eight_steps(own, beyond=half - 1 - from_end, until=from_end + 1, micro_batches=micro_batches // 2)


def dualpipev(rank: int, placement: StagePlacement, micro_batches: int) -> Iterator[OpAndChunks]:
    """Write DualPipeV: the last rank is the turn and corresponds to both middle ranks of DualPipe.

    P is at least 1 and N at least 2 P; odd numbers are allowed.
    """
    # Nothing is halved, so odd numbers work. On one rank steps 1, 3, 5 and 7 are empty, and there is no bubble.
    return _eight_steps(own=0, beyond=placement.ranks - 1 - rank, until=rank + 1, micro_batches=micro_batches)


def _eight_steps(own: int, beyond: int, until: int, micro_batches: int) -> Iterator[OpAndChunks]:
    """Write the eight steps of a rank with `beyond` ranks between it and the turn, the `until`-th from the end.

    `micro_batches` are those of one chunk.
    """
    # The steps and their counts are those of DeepSeek's dualpipe.py and dualpipev.py.
    other = 1 - own
    # 1, 2: fill the pipeline; the other chunk's first micro-batch arrives when one has gone to the turn and back.
    yield from _times(2 * beyond, (Op.F, own))
    yield from _times(until, (Op.F, own), (Op.F, other))
    # 3: gradients come back from the turn. Each is sent before its weight gradients are computed.
    yield from _times(beyond, (Op.I, other), (Op.W,), (Op.F, other))
    # 4: the steady state. At the turn the first pair runs as F and B: the backward needs nothing from a neighbor, and
    # all other ranks wait for its gradient.
    pairs = _times(micro_batches - 2 * (beyond + until) + until, (Op.FB, own, other), (Op.FB, other, own))
    yield from pairs if beyond else [(Op.F, own), (Op.B, other), *pairs[1:]]
    # 5: the own chunk has no forwards left.
    yield from _times(beyond, (Op.B, other), (Op.FB, other, own))
    # 6: backwards only; the second half of them send their gradients first and leave weight gradients for the gaps.
    for backward in range(2 * until):
        yield Op.B if backward < until else Op.I, own if backward % 2 else other
    # 7, 8: one weight gradient in each gap between the last gradients, then the rest.
    yield from _times(beyond, (Op.W,), (Op.I, own))
    yield from _times(until, (Op.W,))


def _times(count: int, *written: OpAndChunks) -> list[OpAndChunks]:
    return list(written) * count
