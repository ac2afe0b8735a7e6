"""Registry of schedules: their requirements and their programs."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count

from ....comm.errors import Problem, raise_if_any
from ....comm.units import round_up
from ..placement import PlacementStyle, StagePlacement
from ..program import Op, OpAndChunks, PipelineProgram, number_micro_batches
from .dualpipe import dualpipe, dualpipev
from .unidirectional import gpipe, interleaved_1f1b, one_f_one_b, zb_h1


@dataclass(frozen=True)
class PipelineSchedule:
    """A schedule, and the numbers of ranks and micro-batches that it supports."""

    name: str
    help_text: str
    """One line for help texts."""
    write_rank_program: Callable[[int, StagePlacement, int], Iterable[OpAndChunks]]
    """Function that writes the instructions of a rank, given the placement and the number of micro-batches."""
    placement_style: PlacementStyle = PlacementStyle.LOOP
    chunks_per_rank: int = 1
    """Stages per rank; the default if `allows_any_chunk_count`."""
    allows_any_chunk_count: bool = False
    """True if a rank may hold any number of stages from two on."""
    requires_even_counts: bool = False
    """True if ranks and micro-batches must be even, because ranks mirror each other."""
    requires_two_micro_batches_per_rank: bool = False
    """True if N must be at least 2 P, because the pipeline fills from both ends."""
    requires_multiple_of_ranks: bool = False
    """True if N must be a multiple of P, because micro-batches pass a chunk in groups of P."""

    def problems(self, ranks: int, micro_batches: int, chunks: int | None) -> Iterator[Problem]:
        """Yield a problem for each number that this schedule does not support, with the nearest ones that it does."""
        if self.requires_even_counts and ranks % 2 and ranks > 0:
            nearest = _nearest(ranks, least=2, step=2)
            yield Problem("ranks", ranks, f"{self.name} mirrors ranks and needs an even number of them: {nearest}")
        if chunks is not None and self.allows_any_chunk_count and chunks < 2:
            yield Problem("chunks", chunks, f"{self.name} needs at least 2 chunks per rank; 1f1b has 1")
        if chunks is not None and not self.allows_any_chunk_count and chunks != self.chunks_per_rank:
            fixed = "1 chunk" if self.chunks_per_rank == 1 else f"{self.chunks_per_rank} chunks"
            yield Problem("chunks", chunks, f"{self.name} always has {fixed} per rank; remove this setting")
        if ranks < 1:
            yield Problem("ranks", ranks, f"must be at least {2 if self.requires_even_counts else 1}")
            return
        least = 2 * ranks if self.requires_two_micro_batches_per_rank else 1
        step = 2 if self.requires_even_counts else ranks if self.requires_multiple_of_ranks else 1
        if micro_batches < least or micro_batches % step:
            yield Problem("micro_batches", micro_batches, self._micro_batch_remedy(micro_batches, ranks, least, step))

    def _micro_batch_remedy(self, micro_batches: int, ranks: int, least: int, step: int) -> str:
        demands = []
        if self.requires_even_counts:
            demands.append("an even number")
        if self.requires_multiple_of_ranks:
            demands.append(f"a multiple of {ranks}")
        if self.requires_two_micro_batches_per_rank:
            demands.append(f"≥ {least}" if demands else f"a number ≥ {least}")
        demand = " ".join(demands) or "at least 1"
        where = "1 rank" if ranks == 1 else f"{ranks} ranks"
        return f"{self.name} on {where} needs {demand}: {_nearest(micro_batches, max(least, step), step)}"


SCHEDULES = (
    PipelineSchedule("gpipe", "all forwards, then all backwards", gpipe),
    PipelineSchedule("1f1b", "one forward, one backward (1F1B)", one_f_one_b),
    PipelineSchedule(
        "interleaved",
        "1F1B with several stages per rank",
        interleaved_1f1b,
        chunks_per_rank=2,
        allows_any_chunk_count=True,
        requires_multiple_of_ranks=True,
    ),
    PipelineSchedule("zb_h1", "1F1B with delayed weight gradients in the bubble (ZB-H1)", zb_h1),
    PipelineSchedule(
        "dualpipe",
        "micro-batches from both ends, forward and backward overlapped; two copies of the model",
        dualpipe,
        PlacementStyle.BIDIRECTIONAL,
        chunks_per_rank=2,
        requires_even_counts=True,
        requires_two_micro_batches_per_rank=True,
    ),
    PipelineSchedule(
        "dualpipev",
        "one half of DualPipe, folded: through the ranks and back; one copy of the model",
        dualpipev,
        PlacementStyle.V,
        chunks_per_rank=2,
        requires_two_micro_batches_per_rank=True,
    ),
)


def schedule_problems(schedule: str, ranks: int, micro_batches: int, chunks: int | None = None) -> Iterator[Problem]:
    """Yield each reason why there is no such program, in `schedule`, `ranks`, `micro_batches` or `chunks`."""
    if (found := _find(schedule)) is None:
        names = ", ".join(each.name for each in SCHEDULES)
        yield Problem("schedule", schedule, f"no such schedule; there are: {names}")
    else:
        yield from found.problems(ranks, micro_batches, chunks)


def nearest_valid_micro_batches(schedule: str, ranks: int, micro_batches: int, chunks: int | None = None) -> int:
    """Return the supported number of micro-batches nearest to `micro_batches`."""

    def is_legal(number: int) -> bool:
        problems = schedule_problems(schedule, ranks, number, chunks)
        return number > 0 and not any(problem.field == "micro_batches" for problem in problems)

    pairs = ((micro_batches - distance, micro_batches + distance) for distance in count())
    return next(number for pair in pairs for number in pair if is_legal(number))


def build_placement(schedule: str, ranks: int, chunks: int | None = None) -> StagePlacement:
    """Return the stage placement of `schedule`; the numbers must be supported."""
    found = _find(schedule)
    assert found is not None, schedule
    return StagePlacement(found.placement_style, ranks, found.chunks_per_rank if chunks is None else chunks)


def build_program(schedule: str, ranks: int, micro_batches: int, chunks: int | None = None) -> PipelineProgram:
    """Return the program of `schedule` for N = `micro_batches` on P = `ranks`. Raises `ConfigError` if there is none.

    `chunks` is the number of stages per rank, for `interleaved`; it is fixed for the others.
    """
    raise_if_any(schedule_problems(schedule, ranks, micro_batches, chunks))
    found = _find(schedule)
    assert found is not None
    placement = build_placement(schedule, ranks, chunks)
    written = (found.write_rank_program(rank, placement, micro_batches) for rank in range(ranks))
    return PipelineProgram(schedule, placement, micro_batches, tuple(tuple(number_micro_batches(w)) for w in written))


def build_forward_program(placement: StagePlacement, micro_batches: int) -> PipelineProgram:
    """Return a program of forwards alone through the stages of `placement`, for evaluation and generation.

    In a bidirectional placement only the copy of chunk 0 runs.
    """
    # Micro-batches pass a chunk in groups of P, so that each reaches its next stage when that rank is free.
    if placement.style is PlacementStyle.BIDIRECTIONAL:
        placement = StagePlacement(PlacementStyle.LOOP, placement.ranks, chunks_per_rank=1)
    forwards = (
        (Op.F, chunk)
        for start in range(0, micro_batches, placement.ranks)
        for chunk in range(placement.chunks_per_rank)
        for _ in range(min(placement.ranks, micro_batches - start))
    )
    instructions = (tuple(number_micro_batches(forwards)),) * placement.ranks
    return PipelineProgram("forward", placement, micro_batches, instructions)


def _find(schedule: str) -> PipelineSchedule | None:
    return next((each for each in SCHEDULES if each.name == schedule), None)


def _nearest(value: int, least: int, step: int) -> str:
    below, above = value // step * step, round_up(value, step)
    legal = [number for number in dict.fromkeys((below, above)) if number >= least]
    return "nearest " + " or ".join(map(str, legal or [least]))
