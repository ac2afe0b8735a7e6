"""Timeline of a pipeline program as SVG, for a paper or a browser."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from ...parallelism.pipeline.draw import bubble_summary, program_title
from ...parallelism.pipeline.placement import Direction, PlacementStyle
from ...parallelism.pipeline.program import ChunkMicroBatch, Instruction, Op, PipelineProgram, count_in_flight
from ...parallelism.pipeline.simulate import SimulatedTimes

_INK = "#22272e"
# Different in hue and in lightness: also distinct for color-blind readers and in black-and-white print.
_COLORS = {Op.F: "#f0a830", Op.B: "#2f8f83", Op.I: "#4a78b5", Op.W: "#a38cc6"}
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


@dataclass(frozen=True)
class SvgStyle:
    """Style of a timeline; the defaults are for a standalone picture on white."""

    text_color: str = _INK
    muted_color: str = "#6b7280"
    bubble_color: str = "#eef0f2"
    line_color: str = "#d5d9de"
    background_color: str = "#ffffff"
    pixels_per_time_unit: float | None = None
    """Pixels per unit of time, for pictures that are compared; None: as many as the boxes need."""
    min_width: float = 330.0
    """Least pixels of the timeline."""
    time_unit: str = "time"
    """Unit on the time axis."""
    heading: str = ""
    """Title; empty: the schedule and its size."""


STANDALONE_STYLE = SvgStyle()


@dataclass(frozen=True)
class _Canvas:
    """Positions of rows and times in pixels."""

    times: SimulatedTimes
    style: SvgStyle
    scale: float
    """Pixels per unit of time."""

    @property
    def program(self) -> PipelineProgram:
        return self.times.program

    @property
    def right(self) -> float:
        return _LEFT + max(self.times.makespan * self.scale, self.style.min_width)

    @property
    def bottom(self) -> float:
        return self.row(self.program.ranks) - _GAP

    def x(self, time: float) -> float:
        return _LEFT + time * self.scale

    def row(self, rank: int) -> float:
        return _TOP + rank * (_ROW + _GAP)


def svg_timeline(times: SimulatedTimes, subtitle: str = "", style: SvgStyle = STANDALONE_STYLE) -> str:
    """Draw one row per rank and one box per instruction, labeled with its micro-batch; gray is bubble.

    `subtitle` follows makespan and bubble below the title.
    """
    canvas = _Canvas(
        times, style, _fitting(times) if style.pixels_per_time_unit is None else style.pixels_per_time_unit
    )
    width, height = canvas.right + _RIGHT, canvas.bottom + 76
    body = [*_heading(canvas, subtitle), *_rows(canvas), *_axis(canvas), *_columns(canvas), *_legend(canvas)]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
            f'height="{height:g}" font-family="Helvetica, Arial, sans-serif" font-size="11" fill="{style.text_color}">',
            f'<rect width="{width:g}" height="{height:g}" fill="{style.background_color}"/>',
            *body,
            "</svg>",
        ]
    )


def _fitting(times: SimulatedTimes) -> float:
    """Return pixels per unit of time: the shortest box fits its number, unless the picture becomes too wide."""
    durations = [
        end - start
        for starts, ends in zip(times.start_times, times.end_times, strict=True)
        for start, end in zip(starts, ends, strict=True)
    ]
    fitting = min(_UNIT_WIDTH / min(durations), _WIDEST / times.makespan)
    return max(fitting, _NARROWEST / min(durations))


def _heading(canvas: _Canvas, note: str) -> Iterator[str]:
    yield _text(_LEFT, 30, canvas.style.heading or program_title(canvas.program), size=16, weight="bold")
    yield _text(
        _LEFT,
        50,
        "; ".join(filter(None, (bubble_summary(canvas.times), note))),
        size=12,
        color=canvas.style.muted_color,
    )


def _rows(canvas: _Canvas) -> Iterator[str]:
    times = canvas.times
    for rank, instructions in enumerate(canvas.program.instructions):
        top = canvas.row(rank)
        yield _text(_LEFT - 10, top + _ROW / 2 + 4, f"rank {rank}", anchor="end")
        yield _rect(_LEFT, top, times.makespan * canvas.scale, _ROW, canvas.style.bubble_color)
        for instruction, start, end in zip(instructions, times.start_times[rank], times.end_times[rank], strict=True):
            left, right = canvas.x(start) + 0.4, canvas.x(end) - 0.4
            yield f"<g><title>{escape(f'rank {rank}: {instruction}, {start:g} to {end:g}')}</title>"
            yield from _box(canvas.program, instruction, left, top, right - left)
            yield "</g>"


def _box(program: PipelineProgram, instruction: Instruction, left: float, top: float, width: float) -> Iterator[str]:
    """Yield one instruction's boxes; an FB has its forward above its backward, as they overlap."""
    height = _ROW / len(instruction.chunk_micro_batches)
    for index, (op, work) in enumerate(
        zip(map(Op, instruction.op.value), instruction.chunk_micro_batches, strict=True)
    ):
        y = top + index * height
        color = _color(op, work, program.chunks_per_rank)
        yield _rect(left, y, width, height, color)
        number, size = str(work.micro_batch), 11 if height > 12 else 9.5
        if width > 0.58 * size * len(number) + 1.5:
            yield _text(
                left + width / 2,
                y + height / 2 + 0.36 * size,
                number,
                size=size,
                anchor="middle",
                color=_readable(color),
            )


def _axis(canvas: _Canvas) -> Iterator[str]:
    y, makespan = canvas.bottom + 8, canvas.times.makespan
    step = _tick(60 / canvas.scale)
    yield _line(_LEFT, y, canvas.x(makespan), y, canvas.style.line_color)
    for index in range(int(makespan / step) + 1):
        x = canvas.x(index * step)
        yield _line(x, y, x, y + 4, canvas.style.line_color)
        yield _text(x, y + 16, f"{index * step:g}", size=10, anchor="middle", color=canvas.style.muted_color)
    yield _text(_LEFT - 10, y + 16, canvas.style.time_unit, size=10, anchor="end", color=canvas.style.muted_color)


def _columns(canvas: _Canvas) -> Iterator[str]:
    """Yield each rank's peak of chunks in flight and its bubble, as a number and a bar."""
    peaks = [float(max(alive)) for alive in count_in_flight(canvas.program)]
    for index, (heading, unit, values) in enumerate(
        (
            ("in flight", "chunks, peak", peaks),
            ("bubble", canvas.style.time_unit, list(canvas.times.bubble_time_per_rank)),
        )
    ):
        left = canvas.right + 22 + index * 74
        yield _text(left, _TOP - 20, heading, weight="bold")
        yield _text(left, _TOP - 8, unit, size=9, color=canvas.style.muted_color)
        for rank, value in enumerate(values):
            y = canvas.row(rank)
            yield _text(left, y + _ROW / 2 + 1, f"{value:.4g}")
            yield _rect(left, y + _ROW - 7, 54, 3, canvas.style.bubble_color)
            yield _rect(left, y + _ROW - 7, 54 * value / (max(values) or 1), 3, canvas.style.muted_color)


def _legend(canvas: _Canvas) -> Iterator[str]:
    program, x, y = canvas.program, _LEFT, canvas.bottom + 44
    present = {instruction.op for row in program.instructions for instruction in row}
    for op in (op for op in Op if op in present):
        for chunk in range(program.chunks_per_rank):
            pair = (Op.F, Op.B) if op is Op.FB else (op,)
            for index, part in enumerate(pair):
                # An FB's backward belongs to the other chunk.
                work = ChunkMicroBatch(chunk if index == 0 else program.chunks_per_rank - 1 - chunk, 0)
                height = 14 / len(pair)
                yield _rect(x, y + index * height, 14, height, _color(part, work, program.chunks_per_rank))
            x += 15
        yield (
            f'<text x="{x + 6:.2f}" y="{y + 11:.2f}"><tspan font-weight="bold">{op.value}</tspan>'
            f'<tspan dx="4">{_NAMES[op]}</tspan></text>'
        )
        x += 34 + 8 * len(op.value) + 5.6 * len(_NAMES[op])
    if program.chunks_per_rank > 1:
        yield _text(_LEFT, y + 28, _chunk_note(program), size=10, color=canvas.style.muted_color)


def _chunk_note(program: PipelineProgram) -> str:
    arrows = {Direction.NEXT: "to next rank", Direction.PREV: "to previous rank"}
    chunks = [
        f"chunk {chunk} ({arrows[program.placement.direction_of_chunk(chunk)]})"
        for chunk in range(program.chunks_per_rank)
    ]
    note = f"dark to light: {', '.join(chunks)}"
    bidirectional = program.placement.style is PlacementStyle.BIDIRECTIONAL
    return f"{note}; micro-batches are numbered per direction" if bidirectional else note


def _color(op: Op, work: ChunkMicroBatch, chunks: int) -> str:
    """Return the op's color, lighter for later chunks."""
    white = 0.55 * work.chunk / max(chunks - 1, 1)
    return "#" + "".join(f"{round(value + (255 - value) * white):02x}" for value in _channels(_COLORS[op]))


def _channels(color: str) -> tuple[int, ...]:
    return tuple(int(color[start : start + 2], 16) for start in (1, 3, 5))


def _readable(background: str) -> str:
    """Return white or dark text, whichever is readable on `background`, by luma."""
    red, green, blue = _channels(background)
    return "#ffffff" if 0.299 * red + 0.587 * green + 0.114 * blue < 135 else _INK


def _tick(least: float) -> float:
    """Return the first of …, 1, 2, 5, 10, 20, … that is at least `least`."""
    magnitude = 10.0 ** math.floor(math.log10(least))
    return next(step for base in (1, 2, 5, 10) if (step := base * magnitude) >= least)


def _rect(x: float, y: float, width: float, height: float, color: str) -> str:
    return f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" fill="{color}"/>'


def _line(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    return f'<line x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}" stroke="{color}"/>'


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: float = 11,
    anchor: str = "start",
    weight: str = "normal",
    color: str | None = None,
) -> str:
    """Return a text element in the picture's text color, or in `color`."""
    fill = "" if color is None else f' fill="{color}"'
    return (
        f'<text x="{x:.2f}" y="{y:.2f}" font-size="{size:g}" text-anchor="{anchor}" font-weight="{weight}"'
        f"{fill}>{escape(text)}</text>"
    )
