"""Writes the instructions of one rank: keeps count of micro-batches, so that a schedule reads as a list of steps."""

from __future__ import annotations

from collections import deque

from .program import Instruction, Op, Work


class RankWriter:
    """Appends instructions; each call takes the chunk's next micro-batch."""

    def __init__(self, chunks: int) -> None:
        self._forwards = [0] * chunks
        self._backwards = [0] * chunks
        self._pending: deque[Work] = deque()
        self._written: list[Instruction] = []

    def forward(self, chunk: int = 0) -> None:
        """F."""
        self._written.append(Instruction(Op.F, forward=_next(self._forwards, chunk)))

    def backward(self, chunk: int = 0) -> None:
        """B."""
        self._written.append(Instruction(Op.B, backward=_next(self._backwards, chunk)))

    def input_gradient(self, chunk: int = 0) -> None:
        """I: the same micro-batch's weight gradients become pending."""
        work = _next(self._backwards, chunk)
        self._pending.append(work)
        self._written.append(Instruction(Op.I, backward=work))

    def weight_gradient(self) -> None:
        """W of what has been pending longest."""
        self._written.append(Instruction(Op.W, backward=self._pending.popleft()))

    def forward_backward(self, forward: int, backward: int) -> None:
        """FB: the forward of chunk `forward` overlapped with the backward of chunk `backward`."""
        works = _next(self._forwards, forward), _next(self._backwards, backward)
        self._written.append(Instruction(Op.FB, *works))

    def instructions(self) -> tuple[Instruction, ...]:
        """All that has been written."""
        return tuple(self._written)


def _next(counts: list[int], chunk: int) -> Work:
    work = Work(chunk, counts[chunk])
    counts[chunk] += 1
    return work
