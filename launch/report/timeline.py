"""Timeline of a pipeline program, as text for a terminal and as SVG for a paper or a browser."""

import math
from collections.abc import Iterator

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
    rows = [
        [(_label(instruction, program.chunks_per_rank), start, end) for instruction, start, end in row]
        for row in times.timed_instructions
    ]
    # The smallest scale at which every instruction has room for its label and a space.
    scale = math.ceil(max((len(label) + 1) / (end - start) for row in rows for label, start, end in row))
    peaks = [max(alive) for alive in count_in_flight(program)]
    margin = len(f"rank {program.ranks - 1}")
    lines = [program_title(program)]
    for rank, row in enumerate(rows):
        line = ""
        for label, start, end in row:
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
    program, scale = times.program, _fitting(times) if scale is None else scale
    length, bottom = times.makespan * scale, _row_top(program.ranks) - _GAP
    right = _LEFT + max(length, min_width)
    note = "; ".join(filter(None, (_bubble_summary(times), subtitle)))
    key, end = svg.legend(_LEFT, bottom + 44, right + _RIGHT, _legend_marks(program))
    marks = [
        svg.text(_LEFT, 30, heading or program_title(program), font_size=16, font_weight="bold"),
        svg.text(_LEFT, 50, note, "faint", font_size=12),
        *_rows(times, scale),
        *svg.time_axis(_LEFT, bottom + 8, length, times.makespan, unit),
        *_columns(times, right, unit),
        *key,
    ]
    if program.chunks_per_rank > 1:
        marks.append(svg.text(_LEFT, end + 14, _chunk_note(program), "faint", font_size=10))
    return svg.picture(right + _RIGHT, end + 18, marks, font_size=11)


def _row_top(rank: int) -> float:
    return _TOP + rank * (_ROW + _GAP)


def _fitting(times: SimulatedTimes) -> float:
    """Return pixels per unit of time: the shortest box fits its number, unless the picture becomes too wide."""
    shortest = min(end - start for row in times.timed_instructions for _, start, end in row)
    return max(min(_UNIT_WIDTH / shortest, _WIDEST / times.makespan), _NARROWEST / shortest)


def _rows(times: SimulatedTimes, scale: float) -> Iterator[Markup]:
    for rank, row in enumerate(times.timed_instructions):
        top = _row_top(rank)
        yield svg.text(_LEFT - 10, top + _ROW / 2 + 4, f"rank {rank}", text_anchor="end")
        yield svg.rect(_LEFT, top, times.makespan * scale, _ROW, "bubble")
        for instruction, start, end in row:
            left, width = _LEFT + start * scale + 0.4, (end - start) * scale - 0.8
            title = f"rank {rank}: {instruction}, {start:g} to {end:g}"
            yield svg.group(title, _box(times.program, instruction, left, top, width))


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


def _columns(times: SimulatedTimes, right: float, unit: str) -> Iterator[Markup]:
    """Yield each rank's peak of chunks in flight and its bubble, as a number and a bar."""
    peaks = [max(alive) for alive in count_in_flight(times.program)]
    columns = (("in flight", "chunks, peak", peaks), ("bubble", unit, times.bubble_time_per_rank))
    for index, (heading, of, values) in enumerate(columns):
        left = right + 22 + index * 74
        yield svg.text(left, _TOP - 20, heading, font_weight="bold")
        yield svg.text(left, _TOP - 8, of, "faint", font_size=9)
        for rank, value in enumerate(values):
            y = _row_top(rank)
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
