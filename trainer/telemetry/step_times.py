"""Time of a sampled step by term, of one rank or summed over all ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

from ...comm.trace import TimelineTrack
from ...parallelism.pipeline.program import Op, PipelineProgram
from ...parallelism.pipeline.simulate import ideal_bubble_time
from ..ledger.terms import INSTRUCTIONS, STEP_TIME_TERMS
from .trace import Span, summarize_trace


@dataclass(frozen=True)
class StepTimes:
    """Times of one step in microseconds, of one rank or summed over all ranks."""

    step_us: int
    """Duration of the step, summed over the ranks."""
    terms_us: tuple[int, ...]
    """Times in the order of `STEP_TIME_TERMS`."""
    instruction_us: tuple[int, ...]
    """Times of instructions including their all-to-alls, in the order of `INSTRUCTIONS`."""
    instruction_counts: tuple[int, ...]
    """Number of each instruction."""

    @staticmethod
    def from_spans(spans: Sequence[Span], step_seconds: float) -> "StepTimes":
        """Return the times of one rank's step from its spans."""
        seconds = summarize_trace(spans)
        instructions = [span for span in spans if span.track is TimelineTrack.INSTRUCTION]
        spans_by_op = [[span for span in instructions if span.name == op] for op in INSTRUCTIONS]
        return StepTimes(
            step_us=round(step_seconds * 1e6),
            terms_us=tuple(round(seconds[term] * 1e6) for term in STEP_TIME_TERMS),
            instruction_us=tuple(sum(span.end - span.begin for span in of_op) // 1000 for of_op in spans_by_op),
            instruction_counts=tuple(len(of_op) for of_op in spans_by_op),
        )

    def to_list(self) -> list[int]:
        """Return one list, which ranks can sum element by element."""
        return [self.step_us, *self.terms_us, *self.instruction_us, *self.instruction_counts]

    @staticmethod
    def from_list(numbers: Sequence[int]) -> "StepTimes":
        """Return the step times of a list from `to_list`."""
        terms, ops = 1 + len(STEP_TIME_TERMS), len(INSTRUCTIONS)
        parts = numbers[1:terms], numbers[terms : terms + ops], numbers[terms + ops :]
        return StepTimes(numbers[0], *(tuple(part) for part in parts))

    def us_by_term(self, program: PipelineProgram, replicas: int) -> dict[str, int]:
        """Return microseconds by term, and `bubble`: the pipeline wait of the ideal `program` (`ideal_bubble_time`).

        The rest of pipeline_wait is imbalance. `replicas` pipelines run `program`.
        """
        terms = dict(zip(STEP_TIME_TERMS, self.terms_us, strict=True))
        mean = {
            Op(op): whole / count if count else 0.0
            for op, whole, count in zip(INSTRUCTIONS, self.instruction_us, self.instruction_counts, strict=True)
        }
        return terms | {"bubble": min(terms["pipeline_wait"], round(replicas * ideal_bubble_time(program, mean)))}
