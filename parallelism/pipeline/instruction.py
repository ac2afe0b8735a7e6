"""Contents of an instruction: a forward, a backward or both, as generators that run alone or interleaved.

One definition for three users: the executor runs instructions on tensors, `trainer/memory/chunk.py` counts their bytes,
and the planner their seconds.
"""

from collections.abc import Generator
from typing import Any, Protocol, TypeVar

from .program import Op

Result = TypeVar("Result")
Other = TypeVar("Other")
Resumable = Generator[None, bool | None, Result]
"""Generator that yields after each launch of a communication. A yield returns True while another is interleaved."""


class ChunkWork(Protocol):
    """One micro-batch in one chunk, as instructions run it."""

    def forward(self) -> Resumable[object]:
        """Run the forward."""
        ...

    def backward(self, *, deferred: bool) -> Resumable[object]:
        """Run the backward; if `deferred`, leave its weight gradients to `weight_gradients`."""
        ...

    def weight_gradients(self) -> None:
        """Compute the weight gradients that a deferred backward left."""
        ...


def run_instruction(op: Op, forward: ChunkWork | None, backward: ChunkWork | None, *, overlap: bool = True) -> None:
    """Run one instruction: F and FB have `forward`, all but F have `backward`.

    `overlap` interleaves the two halves of an FB; otherwise the forward runs first. The results are equal.
    """
    if backward is not None and op is Op.W:
        backward.weight_gradients()
    elif forward is not None and backward is not None and overlap:
        interleave(backward.backward(deferred=False), forward.forward())
    else:
        if forward is not None:
            run_to_completion(forward.forward())
        if backward is not None:
            run_to_completion(backward.backward(deferred=op is Op.I))


def run_to_completion(computation: Resumable[Result]) -> Result:
    """Run a generator to its end; it waits for each communication where it needs the result."""
    while True:
        try:
            next(computation)
        except StopIteration as stop:
            result: Result = stop.value
            return result


def interleave(first: Resumable[Result], second: Resumable[Other]) -> tuple[Result, Other]:
    """Run two generators alternately to their ends: one computes while the exchange of the other is in flight."""
    # With the backward first this is the order of the report (§3.2.1, figure 4): each generator launches an exchange at
    # the end of a step and waits for it at the beginning of its next one. While both run, each has three steps per
    # layer: see `parallelism/pipeline/chunk_walk.py`.
    results: list[Any] = [None, None]
    running = {0: first, 1: second}
    started = False  # Python allows only None to be sent to a generator before its first yield
    while running:
        for number, computation in list(running.items()):
            try:
                computation.send(len(running) == 2 if started else None)
            except StopIteration as stop:
                results[number] = stop.value
                del running[number]
        started = True
    return results[0], results[1]
