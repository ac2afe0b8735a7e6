"""Schedule section of a report: the last traced step, measured and simulated."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from statistics import mean

from ...comm.trace import TimelineTrack
from ...parallelism.pipeline.program import Op, PipelineProgram
from ...parallelism.pipeline.schedules.registry import build_program, schedule_problems
from ...parallelism.pipeline.simulate import OpDurations, SimulatedTimes, simulate_program
from ...trainer.ledger.terms import INSTRUCTIONS
from ...trainer.run.profiling import TRACE_FOLDER
from ...trainer.telemetry.trace import TRACE_FILE, Span, read_trace
from ..answers.blocks import Block, Figure, MissingDataNotice, Paragraph
from .run_record import RunRecord
from .timeline import program_title, svg_timeline
from .trace_svg import svg_layer_pair

_MOST_INSTRUCTIONS = 10**6
"""Most instructions that are drawn. More would be unreadable, and a damaged number may ask for any size."""
_PAGE = 760.0
"""Pixels of the timeline that fit on the page."""
_LEAST = 5.0
"""Least mean pixels per box; a longer program scrolls."""


def schedule_section(record: RunRecord) -> Iterator[Block]:
    """Yield measured and simulated timelines to one scale, and one pair of layers."""
    program = _program(record)
    if program is None:
        yield MissingDataNotice("No timeline: the configuration that names the schedule is not recorded.")
        return
    path = record.run_dir / TRACE_FOLDER / TRACE_FILE
    columns = record.config_value("topology.edp") * record.config_value("topology.ep")
    try:
        ranks = read_trace(path)
        real = last_traced_step(program, [ranks.get(rank * columns, []) for rank in range(program.ranks)])
    except FileNotFoundError:
        reason = "No measured timeline is recorded."
    except (ValueError, OSError) as error:
        reason = f"{path} {error}."
    else:
        if real is not None:
            yield from _measured(real, ranks, columns)
            return
        reason = "The timeline does not match the configured program."
    yield MissingDataNotice(reason, "telemetry.trace=true records a timeline of some steps.")
    simulated = {f"{program_title(program)}, simulated": simulate_program(program, OpDurations())}
    yield from _timelines(simulated, "every F, I and W takes 1, FB without overlap")


def _program(record: RunRecord) -> PipelineProgram | None:
    """Return the program that the run's configuration describes, or None."""
    names = "topology.pp", "topology.edp", "topology.ep", "schedule.micro_batch_size", "training.global_batch_size"
    numbers = [record.config_value(name) for name in names]
    if not all(type(number) is int and number > 0 for number in numbers):
        return None
    pp, edp, ep, micro_batch, batch = numbers
    micro_batches = batch // (edp * ep * micro_batch)
    name, chunks = record.config_value("schedule.name"), record.config_value("schedule.chunks")
    if type(name) is not str or type(chunks) not in (int, type(None)) or pp * micro_batches > _MOST_INSTRUCTIONS:
        return None
    if any(schedule_problems(name, pp, micro_batches, chunks)):  # written by a version with other schedules
        return None
    return build_program(name, pp, micro_batches, chunks)


def _measured(real: SimulatedTimes, ranks: Mapping[int, Sequence[Span]], columns: int) -> Iterator[Block]:
    ideal = simulate_program(real.program, mean_op_times(real))
    share = 100 * (real.makespan - ideal.makespan) / real.makespan
    of = "" if columns == 1 else f" The first of each stage's {columns} ranks is shown."
    yield Paragraph(
        f"{program_title(real.program)}. The last traced step took {real.makespan:.1f}\u00a0ms from the first forward "
        "to the last backward. Simulated, with every instruction at the mean duration of its kind in that step, it "
        f"takes {ideal.makespan:.1f}\u00a0ms. The other {share:.1f}\u00a0% are uneven durations and P2P communication."
        f"{of}"
    )
    yield from _timelines({"Measured": real, "Simulated": ideal}, unit="ms")
    with suppress(ValueError):  # not every schedule overlaps layer pairs
        yield Figure("", svg_layer_pair(ranks), is_wide=True)


def _timelines(timelines: Mapping[str, SimulatedTimes], note: str = "", unit: str = "time") -> Iterator[Figure]:
    """Yield timelines of one program by heading, to one scale."""
    width = max(_PAGE, *(_LEAST * len(row) for times in timelines.values() for row in times.program.instructions))
    scale = width / max(times.makespan for times in timelines.values())
    for heading, times in timelines.items():
        picture = svg_timeline(times, note, heading=heading, unit=unit, scale=scale, min_width=width)
        yield Figure("", picture, is_wide=True)


def last_traced_step(program: PipelineProgram, ranks: Sequence[Sequence[Span]]) -> SimulatedTimes | None:
    """Return the last step's times in ms from each pipeline rank's spans; None if they are of another program."""
    rows: list[list[Span]] = []
    for instructions, spans in zip(program.instructions, ranks, strict=True):
        traced = [span for span in spans if span.track is TimelineTrack.INSTRUCTION and span.name in INSTRUCTIONS]
        last = sorted(traced, key=lambda span: span.begin)[-len(instructions) :]
        if [span.detail for span in last] != [str(instruction) for instruction in instructions]:
            return None
        rows.append(last)
    start = min(row[0].begin for row in rows)
    return SimulatedTimes(
        program,
        tuple(tuple((span.begin - start) / 1e6 for span in row) for row in rows),
        tuple(tuple((span.end - start) / 1e6 for span in row) for row in rows),
    )


def mean_op_times(real: SimulatedTimes) -> OpDurations:
    """Return the mean duration per op, over all ranks."""
    lengths: Mapping[Op, list[float]] = defaultdict(list)
    for instruction, start, end in chain.from_iterable(real.timed_instructions):
        lengths[instruction.op].append(end - start)
    times = {op: mean(found) for op, found in lengths.items()}
    return OpDurations(*(times.get(op, 0.0) for op in (Op.F, Op.I, Op.W, Op.B, Op.FB)))
