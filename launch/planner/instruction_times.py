"""Durations of a program's instructions on every rank, and their exposed communication."""

from collections.abc import Mapping, Sequence

from ...comm.trace import EXPOSED_ALL_TO_ALL
from ...parallelism.pipeline.chunk_walk import StageShape
from ...parallelism.pipeline.program import Instruction, Op
from .recipe import ForecastRecipe
from .stream_simulation import ChunkTimeModel, SimulatedStreams

InstructionCounts = Sequence[Mapping[tuple[Op, int | None, int | None], int]]
"""One mapping per rank: op, forward chunk and backward chunk to the number of such instructions."""


class InstructionTimes:
    """Durations of a program's instructions, and their exposed communication."""

    def __init__(
        self,
        costs: ChunkTimeModel,
        held: Sequence[tuple[StageShape, ...]],
        counts: InstructionCounts,
        recipe: ForecastRecipe,
        slowest: float,
    ) -> None:
        self._costs, self._held, self._counts, self._slowest = costs, held, counts, slowest
        # A step of DeepSeek-V3 has 145 to 158 instructions per rank, of about ten kinds: each kind is simulated once.
        self._seconds = [
            {key: self._streams(rank, key).elapsed_seconds * slowest for key in kinds}
            for rank, kinds in enumerate(self._counts)
        ]
        if not recipe.uneven_stages:
            self._equalize()
        for rank, factor in recipe.slowdown_by_pp_rank:
            self._seconds[rank] = {key: seconds * factor for key, seconds in self._seconds[rank].items()}

    def duration(self, rank: int, instruction: Instruction) -> float:
        """Return the seconds of `instruction` on `rank`."""
        return self._seconds[rank][instruction.op_and_chunks]

    def time_terms(self, rank: int) -> dict[str, float]:
        """Return a rank's seconds by op without exposed all-to-alls, and the seconds of these."""
        terms: dict[str, float] = dict.fromkeys([op.value for op in Op], 0.0)
        exposed = 0.0
        for key, count in self._counts[rank].items():
            # With equalized stages (a what-if) an instruction can be shorter than its simulated waits.
            waits = min(self._streams(rank, key).exposed_seconds * self._slowest, self._seconds[rank][key])
            terms[key[0].value] += count * (self._seconds[rank][key] - waits)
            exposed += count * waits
        return terms | {EXPOSED_ALL_TO_ALL: exposed}

    def _streams(self, rank: int, key: tuple[Op, int | None, int | None]) -> SimulatedStreams:
        forward, backward = (None if chunk is None else self._held[rank][chunk] for chunk in key[1:])
        return self._costs.simulate_instruction(key[0].value, forward, backward)

    def _equalize(self) -> None:
        """Give every instruction of an op the mean duration, as if all stages were equal."""
        for op in Op:
            all_of = [
                (count, self._seconds[rank][key])
                for rank, counts in enumerate(self._counts)
                for key, count in counts.items()
                if key[0] is op
            ]
            if not all_of:
                continue
            mean = sum(count * seconds for count, seconds in all_of) / sum(count for count, _ in all_of)
            for seconds_of in self._seconds:
                seconds_of.update({key: mean for key in seconds_of if key[0] is op})
