"""Where the time of a step goes, over all ranks together: each rank's terms, added up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...comm.trace import Track
from ...parallelism.pipeline.program import Op, Program
from ...parallelism.pipeline.simulate import ideal_wait
from ..ledger.terms import INSTRUCTIONS, TERMS
from .trace import Span, summarize_trace


@dataclass(frozen=True)
class StepSample:
    """One step, of one rank or of all of them. Times are in microseconds."""

    step_us: int
    """The step, times the ranks."""
    terms_us: tuple[int, ...]
    """In the order of `TERMS`."""
    whole_us: tuple[int, ...]
    """Instructions with the exchanges that they wait for, in the order of `INSTRUCTIONS`."""
    counts: tuple[int, ...]
    """How many of each instruction."""

    @staticmethod
    def of(spans: Sequence[Span], step_seconds: float) -> StepSample:
        """One rank's step, of which `spans` were recorded."""
        seconds = summarize_trace(spans)
        instructions = [span for span in spans if span.track is Track.INSTRUCTION]
        own = [[span for span in instructions if span.name == op] for op in INSTRUCTIONS]
        return StepSample(
            step_us=round(step_seconds * 1e6),
            terms_us=tuple(round(seconds[term] * 1e6) for term in TERMS),
            whole_us=tuple(sum(span.end - span.begin for span in of_op) // 1000 for of_op in own),
            counts=tuple(len(of_op) for of_op in own),
        )

    def numbers(self) -> list[int]:
        """As one list, which ranks can add up."""
        return [self.step_us, *self.terms_us, *self.whole_us, *self.counts]

    @staticmethod
    def from_numbers(numbers: Sequence[int]) -> StepSample:
        """The inverse."""
        terms, ops = 1 + len(TERMS), len(INSTRUCTIONS)
        parts = numbers[1:terms], numbers[terms : terms + ops], numbers[terms + ops :]
        return StepSample(numbers[0], *(tuple(part) for part in parts))

    def by_term(self, program: Program, replicas: int) -> dict[str, int]:
        """Microseconds by term, and `bubble`: the part of edge_wait that `program` has by itself.

        See `ideal_wait`; the rest of edge_wait is imbalance. `replicas` pipelines run `program`.
        """
        terms = dict(zip(TERMS, self.terms_us, strict=True))
        mean = {
            Op(op): whole / count if count else 0.0
            for op, whole, count in zip(INSTRUCTIONS, self.whole_us, self.counts, strict=True)
        }
        return terms | {"bubble": min(terms["edge_wait"], round(replicas * ideal_wait(program, mean)))}
