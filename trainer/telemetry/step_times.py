"""Where the time of a step goes, over all ranks together: each rank's terms, added up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...comm.trace import TimelineTrack
from ...parallelism.pipeline.program import Op, PipelineProgram
from ...parallelism.pipeline.simulate import ideal_bubble_time
from ..ledger.terms import INSTRUCTIONS, STEP_TIME_TERMS
from .trace import Span, summarize_trace


@dataclass(frozen=True)
class StepTimes:
    """One step, of one rank or of all of them. Times are in microseconds."""

    step_us: int
    """The step, times the ranks."""
    terms_us: tuple[int, ...]
    """In the order of `STEP_TIME_TERMS`."""
    instruction_us: tuple[int, ...]
    """Instructions with the exchanges that they wait for, in the order of `INSTRUCTIONS`."""
    instruction_counts: tuple[int, ...]
    """How many of each instruction."""

    @staticmethod
    def from_spans(spans: Sequence[Span], step_seconds: float) -> StepTimes:
        """One rank's step, of which `spans` were recorded."""
        seconds = summarize_trace(spans)
        instructions = [span for span in spans if span.track is TimelineTrack.INSTRUCTION]
        own = [[span for span in instructions if span.name == op] for op in INSTRUCTIONS]
        return StepTimes(
            step_us=round(step_seconds * 1e6),
            terms_us=tuple(round(seconds[term] * 1e6) for term in STEP_TIME_TERMS),
            instruction_us=tuple(sum(span.end - span.begin for span in of_op) // 1000 for of_op in own),
            instruction_counts=tuple(len(of_op) for of_op in own),
        )

    def to_list(self) -> list[int]:
        """As one list, which ranks can add up."""
        return [self.step_us, *self.terms_us, *self.instruction_us, *self.instruction_counts]

    @staticmethod
    def from_list(numbers: Sequence[int]) -> StepTimes:
        """The inverse."""
        terms, ops = 1 + len(STEP_TIME_TERMS), len(INSTRUCTIONS)
        parts = numbers[1:terms], numbers[terms : terms + ops], numbers[terms + ops :]
        return StepTimes(numbers[0], *(tuple(part) for part in parts))

    def us_by_term(self, program: PipelineProgram, replicas: int) -> dict[str, int]:
        """Microseconds by term, and `bubble`: the part of pipeline_wait that `program` has by itself.

        See `ideal_bubble_time`; the rest of pipeline_wait is imbalance. `replicas` pipelines run `program`.
        """
        terms = dict(zip(STEP_TIME_TERMS, self.terms_us, strict=True))
        mean = {
            Op(op): whole / count if count else 0.0
            for op, whole, count in zip(INSTRUCTIONS, self.instruction_us, self.instruction_counts, strict=True)
        }
        return terms | {"bubble": min(terms["pipeline_wait"], round(replicas * ideal_bubble_time(program, mean)))}
