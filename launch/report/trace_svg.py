"""SVG of one overlapped pair of MoE layers, a forward's and a backward's, from a real trace: two streams, to scale.

Text and rules have a gray that is readable on light and dark backgrounds; the background is transparent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from ...comm.trace import EXPOSED_ALL_TO_ALL, TimelineTrack
from ...trainer.telemetry.trace import Span

LAYER_PAIR_PHASES = ("attn(W)", "attn(F)", "mlp(B)", "mlp(W)", "mlp(F)", "attn(B)")
"""Compute phases from one combine(B) to the next, in the order of DeepSeek-V3's published trace."""
_FIRST = "combine_backward of "
_NAMES = {
    "dispatch": "dispatch(F)",
    "combine": "combine(F)",
    "combine_backward": "combine(B)",
    "dispatch_backward": "dispatch(B)",
}
_GRAY, _RULE = "#7d8590", "#7d859066"
# Fill and text color; fills as in launch/report/schedule_svg.py.
_COLORS = {"F": ("#f0a830", "#22272e"), "B": ("#2f8f83", "#ffffff"), "W": ("#a38cc6", "#22272e")}
_LEFT, _WIDTH, _RIGHT = 96.0, 880.0, 24.0
_TOP, _LANE, _GAP = 84.0, 54.0, 40.0


@dataclass(frozen=True)
class LayerPair:
    """One overlapped layer pair of an FB, from the launch of one combine(B) to the next; nanoseconds."""

    rank: int
    begin: int
    end: int
    compute_spans: tuple[Span, ...]
    """Compute spans in order; the only gaps are waits."""
    exchange_spans: tuple[Span, ...]
    """Exchange spans that overlap the pair; the first and the last may extend beyond it."""
    wait_spans: tuple[Span, ...]
    launch_spans: tuple[Span, ...]

    @property
    def duration_ns(self) -> int:
        """Length in nanoseconds."""
        return self.end - self.begin

    @property
    def wait_ns(self) -> int:
        """Nanoseconds of waiting for exchanges."""
        return sum(wait.end - wait.begin for wait in self.wait_spans)


def find_layer_pairs(rank: int, spans: Sequence[Span]) -> Iterator[LayerPair]:
    """Yield the layer pairs of every FB of one rank, without those that contain a dense layer or a loss."""
    ordered = sorted(spans, key=lambda span: span.begin)
    for pair in ordered:
        if pair.track is not TimelineTrack.INSTRUCTION or pair.name != "FB":
            continue
        inside = [span for span in ordered if pair.begin <= span.begin and span.end <= pair.end]
        launches = [span.begin for span in inside if _is_first_launch(span)]
        for begin, end in pairwise(launches):
            found = _between(rank, begin, end, inside)
            if tuple(span.name for span in found.compute_spans) == LAYER_PAIR_PHASES:
                yield found


def svg_layer_pair(ranks: Mapping[int, Sequence[Span]]) -> str:
    """Draw the pair of median length over all ranks of the trace. Raises `ValueError` if there is none."""
    pairs = sorted(
        (pair for rank in ranks for pair in find_layer_pairs(rank, ranks[rank])), key=lambda pair: pair.duration_ns
    )
    if not pairs:
        raise ValueError(f"this trace has no overlapped pair of MoE layers: {_missing_pair_reason(ranks)}")
    pair = pairs[len(pairs) // 2]
    canvas = _Canvas(pair)
    width, height = _LEFT + _WIDTH + _RIGHT, canvas.axis + 72
    body = [*_heading(canvas, len(pairs)), *_lanes(canvas), *_launches(canvas), *_axis(canvas), *_legend(canvas)]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
            f'height="{height:g}" font-family="Helvetica, Arial, sans-serif" font-size="12" fill="{_GRAY}">',
            '<defs><pattern id="wait" width="6" height="6" patternUnits="userSpaceOnUse" '
            f'patternTransform="rotate(45)"><rect width="2" height="6" fill="{_GRAY}"/></pattern></defs>',
            *body,
            "</svg>",
        ]
    )


def _missing_pair_reason(ranks: Mapping[int, Sequence[Span]]) -> str:
    pairs = [(fb, spans) for spans in ranks.values() for fb in spans if fb.name == "FB"]
    if not pairs:
        return "its schedule has no FB; use dualpipe or dualpipev"
    layers = max(sum(_is_first_launch(s) and fb.begin <= s.begin < fb.end for s in spans) for fb, spans in pairs)
    if layers > 1:
        return "a dense layer or a loss is in each of them"
    return f"each stage needs at least two MoE layers (here: {'one' if layers == 1 else layers})"


def _is_first_launch(span: Span) -> bool:
    return span.track is TimelineTrack.LAUNCH and span.name.startswith(_FIRST)


def _between(rank: int, begin: int, end: int, inside: Sequence[Span]) -> LayerPair:
    """Return the spans of an FB from `begin` to `end`."""
    meeting = [span for span in inside if span.begin < end and span.end > begin]
    return LayerPair(
        rank=rank,
        begin=begin,
        end=end,
        compute_spans=tuple(
            span for span in meeting if span.track is TimelineTrack.COMPUTE and span.name != EXPOSED_ALL_TO_ALL
        ),
        exchange_spans=tuple(span for span in meeting if span.track is TimelineTrack.EXCHANGE),
        wait_spans=tuple(span for span in meeting if span.name == EXPOSED_ALL_TO_ALL and span.begin >= begin),
        launch_spans=tuple(span for span in inside if span.track is TimelineTrack.LAUNCH and begin <= span.begin < end),
    )


@dataclass(frozen=True)
class _Canvas:
    pair: LayerPair

    @property
    def exchange(self) -> float:
        """Y of the exchange lane's top."""
        return _TOP + _LANE + _GAP

    @property
    def axis(self) -> float:
        return self.exchange + _LANE + 12

    def x(self, time: float) -> float:
        share = (time - self.pair.begin) / self.pair.duration_ns
        return _LEFT + _WIDTH * min(max(share, 0.0), 1.0)


def _heading(canvas: _Canvas, pairs: int) -> Iterator[str]:
    pair = canvas.pair
    forward, backward = pair.compute_spans[1].detail, pair.compute_spans[2].detail
    yield _text(_LEFT, 26, "One layer forward and one backward, in turns", size=17, weight="bold")
    exposed = f"{100 * pair.wait_ns / pair.duration_ns:.0f} % of it waiting for the exchange"
    median = f"the pair of median length of {pairs}" if pairs > 1 else "the one pair"
    yield _text(_LEFT, 46, f"F: {forward}; B: {backward}; rank {pair.rank}; {median} in this trace")
    yield _text(_LEFT, 63, f"{pair.duration_ns / 1e6:.1f} ms, {exposed}")


def _lanes(canvas: _Canvas) -> Iterator[str]:
    pair = canvas.pair
    for name, top in (("compute", _TOP), ("exchange", canvas.exchange)):
        yield _text(_LEFT - 12, top + _LANE / 2 + 4, name, anchor="end", weight="bold")
        yield _rect(_LEFT, top, _WIDTH, _LANE, _RULE, opacity=0.35)
    for wait in pair.wait_spans:
        yield _rect(canvas.x(wait.begin), _TOP, canvas.x(wait.end) - canvas.x(wait.begin), _LANE, "url(#wait)")
    for span in pair.compute_spans:
        yield from _box(canvas, span, span.name, _TOP)
    for span in pair.exchange_spans:
        yield from _box(canvas, span, _NAMES[span.name.partition(" ")[0]], canvas.exchange)


def _box(canvas: _Canvas, span: Span, name: str, top: float) -> Iterator[str]:
    """Yield the boxes of a span without its waits, cut at the picture's edges; the label has its full busy time."""
    waits = [wait for wait in canvas.pair.wait_spans if span.track is TimelineTrack.COMPUTE and _inside(wait, span)]
    edges = [span.begin, *(edge for wait in waits for edge in (wait.begin, wait.end)), span.end]
    pieces = [(canvas.x(begin) + 0.5, canvas.x(end) - 0.5) for begin, end in zip(edges[::2], edges[1::2], strict=True)]
    busy = sum(end - begin for begin, end in zip(edges[::2], edges[1::2], strict=True))
    milliseconds, (color, ink) = f"{busy / 1e6:.1f} ms", _COLORS[name[-2]]
    yield f"<g><title>{escape(f'{name}: {milliseconds}, {span.detail or span.name}')}</title>"
    for left, right in pieces:
        if right > left:
            yield _rect(left, top, right - left, _LANE, color)
    left, right = max(pieces, key=lambda piece: piece[1] - piece[0])
    width = right - left
    for line, (text, size) in enumerate(((name, 12.0), (milliseconds, 10.5))):
        if width > 0.54 * 12.0 * len(name):
            y = top + _LANE / 2 - 3 + 16 * line
            yield _text(left + width / 2, y, text, size=size, anchor="middle", color=ink)
    yield "</g>"


def _inside(wait: Span, span: Span) -> bool:
    return span.begin <= wait.begin and wait.end <= span.end


def _launches(canvas: _Canvas) -> Iterator[str]:
    """Yield a line from the launch of each exchange to its start."""
    begins = {span.name: span.begin for span in canvas.pair.exchange_spans}
    for launch in canvas.pair.launch_spans:
        if launch.name in begins:
            x1, y1 = canvas.x(launch.begin), _TOP + _LANE
            x2, y2 = canvas.x(begins[launch.name]), canvas.exchange
            yield (
                f'<path d="M{x1:.2f} {y1:.2f} L{x2:.2f} {y2:.2f}" stroke="{_GRAY}" stroke-width="1.2" '
                f'stroke-dasharray="3 2" fill="none"/><circle cx="{x1:.2f}" cy="{y1:.2f}" r="2.6"/>'
            )


def _axis(canvas: _Canvas) -> Iterator[str]:
    y, milliseconds = canvas.axis, canvas.pair.duration_ns / 1e6
    step = next(s for s in (m * 10.0**e for e in range(-3, 6) for m in (1, 2, 5)) if milliseconds / s <= 8)
    yield f'<path d="M{_LEFT:.2f} {y:.2f} H{_LEFT + _WIDTH:.2f}" stroke="{_RULE}"/>'
    for tick in range(int(milliseconds / step) + 1):
        x = canvas.x(canvas.pair.begin + tick * step * 1e6)
        yield f'<path d="M{x:.2f} {y:.2f} v5" stroke="{_RULE}"/>'
        yield _text(x, y + 18, f"{tick * step:g}", size=10.5, anchor="middle")
    yield _text(_LEFT - 12, y + 18, "ms", size=10.5, anchor="end")


def _legend(canvas: _Canvas) -> Iterator[str]:
    x, y = _LEFT, canvas.axis + 38
    entries = [("F", "forward"), ("B", "backward: gradients of inputs"), ("W", "gradients of weights")]
    for letter, text in entries:
        yield _rect(x, y, 14, 14, _COLORS[letter][0])
        yield _text(x + 20, y + 11, text)
        x += 42 + 6.1 * len(text)
    yield _rect(x, y, 14, 14, "url(#wait)")
    yield _text(x + 20, y + 11, "waiting for an exchange")
    x += 42 + 6.1 * len("waiting for an exchange")
    yield f'<circle cx="{x + 7:.2f}" cy="{y + 7:.2f}" r="2.6"/>'
    yield _text(x + 16, y + 11, "launch of an exchange")


def _rect(x: float, y: float, width: float, height: float, color: str, *, opacity: float = 1.0) -> str:
    size = f'x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}"'
    return f'<rect {size} rx="2" fill="{color}" fill-opacity="{opacity:g}"/>'


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: float = 12,
    anchor: str = "start",
    weight: str = "normal",
    color: str = _GRAY,
) -> str:
    place = f'x="{x:.2f}" y="{y:.2f}" font-size="{size:g}" text-anchor="{anchor}" font-weight="{weight}"'
    return f'<text {place} fill="{color}">{escape(text)}</text>'
