"""Timeline of a pipeline program, as text for a terminal and as SVG for a paper or a browser."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from markupsafe import Markup

from ...parallelism.pipeline.placement import Direction, PlacementStyle
from ...parallelism.pipeline.program import Instruction, Op, PipelineProgram, count_in_flight
from ...parallelism.pipeline.simulate import SimulatedTimes
from . import svg

# Different in hue and in lightness: also distinct for color-blind readers and in black-and-white print.
OP_COLORS = {op: svg.LIGHT[op.value.lower()] for op in (Op.F, Op.B, Op.I, Op.W)}
_NAMES = {
    Op.F: "forward",
    Op.B: "full backward",
    Op.I: "input gradients",
    Op.W: "weight gradients",
    Op.FB: "forward and backward, overlapped",
}

_ROW, _GAP = 24.0, 5.0  # height of a rank's row, space between rows
_LEFT, _TOP, _RIGHT = 62.0, 78.0, 166.0
_UNIT_WIDTH, _WIDEST, _NARROWEST = 19.0, 2600.0, 3.0  # shortest box: wanted; timeline: most; shortest box: least


def program_title(program: PipelineProgram) -> str:
    """Return the schedule's name and size."""
    ranks = "1 rank" if program.ranks == 1 else f"{program.ranks} ranks"
    chunks = f", {program.chunks_per_rank} chunks per rank" if program.chunks_per_rank > 1 else ""
    return f"{program.schedule}: {ranks}{chunks}, {program.num_micro_batches} micro-batches"


def _bubble_summary(times: SimulatedTimes) -> str:
    return f"makespan {times.makespan:g}, bubble {100 * times.bubble_fraction:.1f} % of the ranks' time"


def ascii_timeline(times: SimulatedTimes) -> str:
    """Return one line per rank, to scale: `F3---` is an instruction, dots are bubble.

    Lower-case letters are chunk 1; with more than two chunks per rank, `F3a` is chunk 0, `F3b` chunk 1, and so on.
    """
    program = times.program
    labels = [[_label(instruction, program.chunks_per_rank) for instruction in row] for row in program.instructions]
    # The smallest scale at which every instruction has room for its label and a space.
    scale = math.ceil(
        max(
            (len(label) + 1) / (end - start)
            for row, starts, ends in zip(labels, times.start_times, times.end_times, strict=True)
            for label, start, end in zip(row, starts, ends, strict=True)
        )
    )
    peaks = [max(alive) for alive in count_in_flight(program)]
    margin = len(f"rank {program.ranks - 1}")
    lines = [program_title(program)]
    for rank, row in enumerate(labels):
        line = ""
        for label, start, end in zip(row, times.start_times[rank], times.end_times[rank], strict=True):
            # Rounded from the start of the line each time: rounding every width would shift later instructions.
            line = line.ljust(round(start * scale), ".")
            width = round(end * scale) - len(line)
            line += (label.ljust(width - 1, "-") + " ")[:width]
        line = line.ljust(round(times.makespan * scale), ".")
        lines.append(
            f"{f'rank {rank}':{margin}} |{line}| bubble {times.bubble_time_per_rank[rank]:g}, in flight {peaks[rank]}"
        )
    return "\n".join([*lines, _bubble_summary(times)])


def _label(instruction: Instruction, chunks: int) -> str:
    parts = []
    for letter, work in zip(instruction.op.value, instruction.chunk_micro_batches, strict=True):
        letter = letter.lower() if chunks == 2 and work.chunk == 1 else letter
        suffix = chr(ord("a") + work.chunk) if chunks > 2 else ""
        parts.append(f"{letter}{work.micro_batch}{suffix}")
    return "".join(parts)


@dataclass(frozen=True)
class _Canvas:
    """Positions of rows and times in pixels."""

    times: SimulatedTimes
    scale: float
    """Pixels per unit of time."""
    min_width: float

    @property
    def program(self) -> PipelineProgram:
        return self.times.program

    @property
    def right(self) -> float:
        return _LEFT + max(self.times.makespan * self.scale, self.min_width)

    @property
    def bottom(self) -> float:
        return self.row(self.program.ranks) - _GAP

    def row(self, rank: int) -> float:
        return _TOP + rank * (_ROW + _GAP)


def svg_timeline(
    times: SimulatedTimes,
    subtitle: str = "",
    *,
    heading: str = "",
    unit: str = "time",
    scale: float | None = None,
    min_width: float = 330.0,
) -> Markup:
    """Draw one row per rank and one box per instruction, labeled with its micro-batch; gray is bubble.

    `subtitle` follows makespan and bubble below the `heading`, which is else the schedule and its size. `scale` is the
    pixels per `unit` of time, for pictures that are compared; else as many as the boxes need. The timeline is at least
    `min_width` pixels wide.
    """
    canvas = _Canvas(times, _fitting(times) if scale is None else scale, min_width)
    width = canvas.right + _RIGHT
    note = "; ".join(filter(None, (_bubble_summary(times), subtitle)))
    key, bottom = svg.legend(_LEFT, canvas.bottom + 44, width, _legend_marks(canvas.program))
    marks = [
        svg.text(_LEFT, 30, heading or program_title(times.program), font_size=16, font_weight="bold"),
        svg.text(_LEFT, 50, note, "faint", font_size=12),
        *_rows(canvas),
        *svg.time_axis(_LEFT, canvas.bottom + 8, times.makespan * canvas.scale, times.makespan, unit),
        *_columns(canvas, unit),
        *key,
    ]
    if canvas.program.chunks_per_rank > 1:
        marks.append(svg.text(_LEFT, bottom + 14, _chunk_note(canvas.program), "faint", font_size=10))
    return svg.picture(width, bottom + 18, marks, font_size=11)


def _fitting(times: SimulatedTimes) -> float:
    """Return pixels per unit of time: the shortest box fits its number, unless the picture becomes too wide."""
    durations = [
        end - start
        for starts, ends in zip(times.start_times, times.end_times, strict=True)
        for start, end in zip(starts, ends, strict=True)
    ]
    fitting = min(_UNIT_WIDTH / min(durations), _WIDEST / times.makespan)
    return max(fitting, _NARROWEST / min(durations))


def _rows(canvas: _Canvas) -> Iterator[Markup]:
    times = canvas.times
    for rank, instructions in enumerate(canvas.program.instructions):
        top = canvas.row(rank)
        yield svg.text(_LEFT - 10, top + _ROW / 2 + 4, f"rank {rank}", text_anchor="end")
        yield svg.rect(_LEFT, top, times.makespan * canvas.scale, _ROW, "bubble")
        for instruction, start, end in zip(instructions, times.start_times[rank], times.end_times[rank], strict=True):
            left, width = _LEFT + start * canvas.scale + 0.4, (end - start) * canvas.scale - 0.8
            title = f"rank {rank}: {instruction}, {start:g} to {end:g}"
            yield svg.group(title, _box(canvas.program, instruction, left, top, width))


def _box(program: PipelineProgram, instruction: Instruction, left: float, top: float, width: float) -> Iterator[Markup]:
    """Yield one instruction's boxes; an FB has its forward above its backward, as they overlap."""
    height = _ROW / len(instruction.chunk_micro_batches)
    for index, (op, work) in enumerate(
        zip(map(Op, instruction.op.value), instruction.chunk_micro_batches, strict=True)
    ):
        y = top + index * height
        color = _color(op, work.chunk, program.chunks_per_rank)
        yield svg.rect(left, y, width, height, color)
        number, size = str(work.micro_batch), 11 if height > 12 else 9.5
        if width > svg.text_width(number, size) + 1.5:
            place, ink = (left + width / 2, y + height / 2 + 0.36 * size), svg.ink_on(color)
            yield svg.text(*place, number, ink, font_size=size, text_anchor="middle")


def _columns(canvas: _Canvas, unit: str) -> Iterator[Markup]:
    """Yield each rank's peak of chunks in flight and its bubble, as a number and a bar."""
    peaks = [max(alive) for alive in count_in_flight(canvas.program)]
    columns = (("in flight", "chunks, peak", peaks), ("bubble", unit, canvas.times.bubble_time_per_rank))
    for index, (heading, of, values) in enumerate(columns):
        left = canvas.right + 22 + index * 74
        yield svg.text(left, _TOP - 20, heading, font_weight="bold")
        yield svg.text(left, _TOP - 8, of, "faint", font_size=9)
        for rank, value in enumerate(values):
            y = canvas.row(rank)
            yield svg.text(left, y + _ROW / 2 + 1, f"{value:.4g}")
            yield svg.rect(left, y + _ROW - 7, 54, 3, "bubble")
            yield svg.rect(left, y + _ROW - 7, 54 * value / (max(values) or 1), 3, "faint")


def _legend_marks(program: PipelineProgram) -> Iterator[svg.LegendMark]:
    chunks, present = program.chunks_per_rank, {i.op for row in program.instructions for i in row}
    for op in (op for op in Op if op in present):
        swatches = []
        for chunk in range(chunks):
            # An FB's backward belongs to the other chunk.
            parts = ((Op.F, chunk), (Op.B, chunks - 1 - chunk)) if op is Op.FB else ((op, chunk),)
            height = 14 / len(parts)
            for index, part in enumerate(parts):
                swatches.append(svg.rect(15 * chunk, index * height, 14, height, _color(*part, chunks)))
        yield svg.LegendMark(_NAMES[op], swatches, width=15 * chunks - 1, initial=op.value)


def _chunk_note(program: PipelineProgram) -> str:
    arrows = {Direction.NEXT: "to next rank", Direction.PREV: "to previous rank"}
    chunks = [
        f"chunk {chunk} ({arrows[program.placement.direction_of_chunk(chunk)]})"
        for chunk in range(program.chunks_per_rank)
    ]
    note = f"dark to light: {', '.join(chunks)}"
    bidirectional = program.placement.style is PlacementStyle.BIDIRECTIONAL
    return f"{note}; micro-batches are numbered per direction" if bidirectional else note


def _color(op: Op, chunk: int, chunks: int) -> str:
    """Return the op's color, lighter for later chunks."""
    white = 0.55 * chunk / max(chunks - 1, 1)
    return "#" + "".join(f"{round(value + (255 - value) * white):02x}" for value in svg.channels(OP_COLORS[op]))
