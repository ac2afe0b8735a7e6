"""Schedule section of a report: the last traced step, measured and simulated."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean

from markupsafe import Markup

from ...comm.trace import TimelineTrack
from ...parallelism.pipeline.program import Op, PipelineProgram
from ...parallelism.pipeline.schedules.registry import build_program, schedule_problems
from ...parallelism.pipeline.simulate import OpDurations, SimulatedTimes, simulate_program
from ...trainer.ledger.terms import INSTRUCTIONS
from ...trainer.run.profiling import TRACE_FOLDER
from ...trainer.telemetry.trace import TRACE_FILE, Span, read_trace
from ..answers.blocks import Block, Figure, MissingDataNotice, PageSection, Paragraph
from .run_record import RunRecord
from .timeline import program_title, svg_timeline
from .trace_svg import svg_layer_pair

_RECORDS = "telemetry.trace=true records a timeline of some steps."
_MOST_INSTRUCTIONS = 10**6
"""Most instructions that are drawn. More would be unreadable, and a damaged number may ask for any size."""
_PAGE = 760.0
"""Pixels of the timeline that fit on the page."""
_LEAST = 5.0
"""Least mean pixels per box; a longer program scrolls."""


def schedule_section(record: RunRecord) -> PageSection:
    """Return the section: measured and simulated timelines to one scale, and one pair of layers."""
    return PageSection("schedule", "Schedule", [*_blocks(record)])


def _blocks(record: RunRecord) -> Iterator[Block]:
    program = _program(record)
    if program is None:
        yield MissingDataNotice("No timeline: the configuration that names the schedule is not recorded.")
        return
    path = record.run_dir / TRACE_FOLDER / TRACE_FILE
    if not path.exists():
        yield MissingDataNotice("No measured timeline is recorded.", _RECORDS)
        yield from _simulated(program)
        return
    yield from _measured(record, program, path)


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


def _simulated(program: PipelineProgram) -> Iterator[Block]:
    simulated = simulate_program(program, OpDurations())
    note = "every F, I and W takes 1, FB without overlap"
    heading = f"{program_title(program)}, simulated"
    width, scale = _width_and_scale(simulated)
    yield _wide(svg_timeline(simulated, note, heading=heading, scale=scale, min_width=width))


def _wide(picture: Markup) -> Figure:
    """Return a picture that contains its heading as a figure."""
    return Figure("", picture, is_wide=True)


def _measured(record: RunRecord, program: PipelineProgram, path: Path) -> Iterator[Block]:
    try:
        ranks = read_trace(path)
    except (ValueError, OSError) as error:
        yield MissingDataNotice(f"{path} {error}.", _RECORDS)
        yield from _simulated(program)
        return
    columns = record.config_value("topology.edp") * record.config_value("topology.ep")
    real = last_traced_step(program, [ranks.get(rank * columns, []) for rank in range(program.ranks)])
    if real is None:
        yield MissingDataNotice("The timeline does not match the configured program.", _RECORDS)
        yield from _simulated(program)
        return
    ideal = simulate_program(program, mean_op_times(real))
    share = 100 * (real.makespan - ideal.makespan) / real.makespan
    of = "" if columns == 1 else f" The first of each stage's {columns} ranks is shown."
    yield Paragraph(
        f"{program_title(program)}. The last traced step took {real.makespan:.1f}\u00a0ms from the first forward to "
        "the last backward. Simulated, with every instruction at the mean duration of its kind in that step, it takes "
        f"{ideal.makespan:.1f}\u00a0ms. The other {share:.1f}\u00a0% are uneven durations and P2P communication.{of}"
    )
    width, scale = _width_and_scale(real, ideal)
    for heading, timeline in (("Measured", real), ("Simulated", ideal)):
        yield _wide(svg_timeline(timeline, heading=heading, unit="ms", scale=scale, min_width=width))
    try:
        yield _wide(svg_layer_pair(ranks))
    except ValueError:  # not every schedule overlaps layer pairs
        return


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
    for row, starts, ends in zip(real.program.instructions, real.start_times, real.end_times, strict=True):
        for instruction, start, end in zip(row, starts, ends, strict=True):
            lengths[instruction.op].append(end - start)
    times = {op: mean(found) for op, found in lengths.items()}
    return OpDurations(*(times.get(op, 0.0) for op in (Op.F, Op.I, Op.W, Op.B, Op.FB)))


def _width_and_scale(*timelines: SimulatedTimes) -> tuple[float, float]:
    """Return the pixels of the longest of a program's timelines, and pixels per unit of time for all of them."""
    width = max(_PAGE, _LEAST * max(len(row) for row in timelines[0].program.instructions))
    return width, width / max(timeline.makespan for timeline in timelines)
