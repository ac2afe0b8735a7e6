"""The pipeline's program as it ran, in the last step that was traced, and beside it as it runs on paper."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean

from markupsafe import Markup

from ...comm.errors import ConfigError
from ...comm.trace import TimelineTrack
from ...parallelism.pipeline.draw import program_title
from ...parallelism.pipeline.program import Op, PipelineProgram
from ...parallelism.pipeline.schedules.registry import build_program
from ...parallelism.pipeline.simulate import OpDurations, SimulatedTimes, simulate_program
from ...trainer.ledger.terms import INSTRUCTIONS
from ...trainer.run.profiling import TRACE_FOLDER
from ...trainer.telemetry.trace import TRACE_FILE, Span, read_trace
from .blocks import Block, Figure, MissingDataNotice, PageSection, Paragraph
from .run_record import RunRecord
from .schedule_svg import SvgStyle, svg_timeline
from .trace_svg import svg_layer_pair

_RECORDS = "telemetry.trace=true records a timeline of some steps."
_MOST_INSTRUCTIONS = 10**6
"""Of a kind, on all ranks: a drawing of more would be of no use, and a damaged number may ask for any number."""
_PAGE = 760.0
"""Pixels of the timeline alone that fit on the page."""
_LEAST = 5.0
"""Pixels of a box, on the average; a longer program scrolls."""


def schedule_section(record: RunRecord) -> PageSection:
    """The real timeline and the simulated one, to the same scale, and one pair of layers."""
    return PageSection("schedule", "Schedule", [*_blocks(record)])


def _blocks(record: RunRecord) -> Iterator[Block]:
    program = _program(record)
    if program is None:
        yield MissingDataNotice("No timeline: the configuration that names the schedule is not recorded.", "")
        return
    path = record.run_dir / TRACE_FOLDER / TRACE_FILE
    if not path.exists():
        yield MissingDataNotice("How the program ran is not recorded.", _RECORDS)
        yield from _on_paper(program)
        return
    yield from _as_it_ran(record, program, path)


def _program(record: RunRecord) -> PipelineProgram | None:
    """The program that the run's configuration describes."""
    names = "topology.pp", "topology.edp", "topology.ep", "schedule.micro_batch_size", "training.global_batch_size"
    numbers = [record.config_value(name) for name in names]
    if not all(type(number) is int and number > 0 for number in numbers):
        return None
    pp, edp, ep, micro_batch, batch = numbers
    try:
        micro_batches = batch // (edp * ep * micro_batch)
        if pp * micro_batches > _MOST_INSTRUCTIONS or type(record.config_value("schedule.name")) is not str:
            return None
        return build_program(
            record.config_value("schedule.name"), pp, micro_batches, record.config_value("schedule.chunks")
        )
    except (ConfigError, TypeError, ValueError):  # of a version of Shoestring whose schedules were others
        return None


def _on_paper(program: PipelineProgram) -> Iterator[Block]:
    simulated = simulate_program(program, OpDurations())
    note = "every F, I and W takes 1, and nothing of an FB overlaps"
    yield _picture(svg_timeline(simulated, note, _look([simulated], f"{program_title(program)}, on paper", "time")))


def _picture(svg: str) -> Figure:
    """Drawn by another part of the package, with a heading of its own."""
    return Figure("", Markup(svg), is_wide=True)


def _as_it_ran(record: RunRecord, program: PipelineProgram, path: Path) -> Iterator[Block]:
    try:
        ranks = read_trace(path)
    except (ValueError, OSError) as error:
        yield MissingDataNotice(f"{path} {error}.", _RECORDS)
        yield from _on_paper(program)
        return
    columns = record.config_value("topology.edp") * record.config_value("topology.ep")
    real = last_traced_step(program, [ranks.get(rank * columns, []) for rank in range(program.ranks)])
    if real is None:
        yield MissingDataNotice("The timeline is not of the program that the configuration describes.", _RECORDS)
        yield from _on_paper(program)
        return
    ideal = simulate_program(program, mean_op_times(real))
    share = 100 * (real.makespan - ideal.makespan) / real.makespan
    of = "" if columns == 1 else f" Shown is the first of the {columns} ranks of each stage."
    yield Paragraph(
        f"{program_title(program)}. The last traced step took {real.makespan:.1f}\u00a0ms from the first forward to the "
        "last backward; on paper, where each kind of instruction always takes its mean of that step, it takes "
        f"{ideal.makespan:.1f}\u00a0ms. The rest, {share:.1f}\u00a0%, is unevenness, messages, waiting for others.{of}"
    )
    for heading, timeline in (("As it ran", real), ("As it runs on paper", ideal)):
        yield _picture(svg_timeline(timeline, style=_look((real, ideal), heading, "ms")))
    try:
        yield _picture(svg_layer_pair(ranks))
    except ValueError:  # not every schedule has one
        return


def last_traced_step(program: PipelineProgram, ranks: Sequence[Sequence[Span]]) -> SimulatedTimes | None:
    """The times of the last step in the spans of each pipeline rank, in ms; None if they are not of this program."""
    rows: list[list[Span]] = []
    for instructions, spans in zip(program.instructions, ranks, strict=True):
        own = [span for span in spans if span.track is TimelineTrack.INSTRUCTION and span.name in INSTRUCTIONS]
        last = sorted(own, key=lambda span: span.begin)[-len(instructions) :]
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
    """Of each kind of instruction, over all ranks."""
    lengths: Mapping[Op, list[float]] = defaultdict(list)
    for row, starts, ends in zip(real.program.instructions, real.start_times, real.end_times, strict=True):
        for instruction, start, end in zip(row, starts, ends, strict=True):
            lengths[instruction.op].append(end - start)
    times = {op: mean(found) for op, found in lengths.items()}
    own = (times.get(op, 0.0) for op in (Op.F, Op.I, Op.W, Op.B, Op.FB))
    return OpDurations(*own)


def _look(timelines: Sequence[SimulatedTimes], heading: str, unit: str) -> SvgStyle:
    """In the page's colors, to a scale that suits all of `timelines`."""
    makespan = max(timeline.makespan for timeline in timelines)
    width = max(_PAGE, _LEAST * max(len(row) for row in timelines[0].program.instructions))
    return SvgStyle(
        text_color="currentColor",
        muted_color="var(--faint)",
        bubble_color="var(--bubble)",
        line_color="var(--rule)",
        background_color="none",
        pixels_per_time_unit=width / makespan,
        min_width=width,
        time_unit=unit,
        heading=heading,
    )
