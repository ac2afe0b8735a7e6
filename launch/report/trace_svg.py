"""SVG of one overlapped pair of MoE layers, a forward's and a backward's, from a real trace: two streams, to scale."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from ...comm.trace import EXPOSED_ALL_TO_ALL, TimelineTrack
from ...trainer.telemetry.trace import Span
from .svg import LegendMark, dot, group, ink_on, legend, line, mark, picture, rect, text, text_width, time_axis
from .timeline import OP_COLORS

LAYER_PAIR_PHASES = ("attn(W)", "attn(F)", "mlp(B)", "mlp(W)", "mlp(F)", "attn(B)")
"""Compute phases from one combine(B) to the next, in the order of DeepSeek-V3's published trace."""
_FIRST = "combine_backward of "
_NAMES = {
    "dispatch": "dispatch(F)",
    "combine": "combine(F)",
    "combine_backward": "combine(B)",
    "dispatch_backward": "dispatch(B)",
}
_COLORS = {op.value: color for op, color in OP_COLORS.items()}
_LEFT, _WIDTH, _RIGHT = 96.0, 880.0, 24.0
_TOP, _LANE, _GAP = 84.0, 54.0, 40.0
_EXCHANGE = _TOP + _LANE + _GAP
"""Y of the exchange lane's top."""
_AXIS = _EXCHANGE + _LANE + 12
_WAIT = "url(#wait)"
_HATCHING = mark(
    "pattern",
    rect(0, 0, 2, 6, "faint"),
    id="wait",
    width=6,
    height=6,
    patternUnits="userSpaceOnUse",
    patternTransform="rotate(45)",
)


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


def svg_layer_pair(ranks: Mapping[int, Sequence[Span]]) -> Markup:
    """Draw the pair of median length over all ranks of the trace. Raises `ValueError` if there is none."""
    pairs = sorted(
        (pair for rank in ranks for pair in find_layer_pairs(rank, ranks[rank])), key=lambda pair: pair.duration_ns
    )
    if not pairs:
        raise ValueError(f"this trace has no overlapped pair of MoE layers: {_missing_pair_reason(ranks)}")
    pair = pairs[len(pairs) // 2]
    key, bottom = legend(_LEFT, _AXIS + 38, _LEFT + _WIDTH, _legend_marks())
    axis = time_axis(_LEFT, _AXIS, _WIDTH, pair.duration_ns / 1e6, "ms")
    marks = [_HATCHING, *_heading(pair, len(pairs)), *_lanes(pair), *_launches(pair), *axis, *key]
    return picture(_LEFT + _WIDTH + _RIGHT, bottom + 20, marks)


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


def _x(pair: LayerPair, time: float) -> float:
    share = (time - pair.begin) / pair.duration_ns
    return _LEFT + _WIDTH * min(max(share, 0.0), 1.0)


def _heading(pair: LayerPair, pairs: int) -> Iterator[Markup]:
    forward, backward = pair.compute_spans[1].detail, pair.compute_spans[2].detail
    yield text(_LEFT, 26, "One layer forward and one backward, in turns", font_size=17, font_weight="bold")
    exposed = f"{100 * pair.wait_ns / pair.duration_ns:.0f} % of it waiting for the exchange"
    median = f"the pair of median length of {pairs}" if pairs > 1 else "the one pair"
    yield text(_LEFT, 46, f"F: {forward}; B: {backward}; rank {pair.rank}; {median} in this trace", "faint")
    yield text(_LEFT, 63, f"{pair.duration_ns / 1e6:.1f} ms, {exposed}", "faint")


def _lanes(pair: LayerPair) -> Iterator[Markup]:
    for name, top in (("compute", _TOP), ("exchange", _EXCHANGE)):
        yield text(_LEFT - 12, top + _LANE / 2 + 4, name, text_anchor="end", font_weight="bold")
        yield rect(_LEFT, top, _WIDTH, _LANE, "bubble", rx=2)
    for wait in pair.wait_spans:
        yield rect(_x(pair, wait.begin), _TOP, _x(pair, wait.end) - _x(pair, wait.begin), _LANE, _WAIT)
    for span in pair.compute_spans:
        yield _box(pair, span, span.name, _TOP)
    for span in pair.exchange_spans:
        yield _box(pair, span, _NAMES[span.name.partition(" ")[0]], _EXCHANGE)


def _box(pair: LayerPair, span: Span, name: str, top: float) -> Markup:
    """Return the boxes of a span without its waits, cut at the picture's edges; the label has its full busy time."""
    waits = [wait for wait in pair.wait_spans if span.track is TimelineTrack.COMPUTE and _inside(wait, span)]
    edges = [span.begin, *(edge for wait in waits for edge in (wait.begin, wait.end)), span.end]
    pieces = list(zip(edges[::2], edges[1::2], strict=True))
    milliseconds = f"{sum(end - begin for begin, end in pieces) / 1e6:.1f} ms"
    color = _COLORS[name[-2]]
    boxes = [(_x(pair, begin) + 0.5, _x(pair, end) - _x(pair, begin) - 1) for begin, end in pieces]
    marks = [rect(left, top, width, _LANE, color, rx=2) for left, width in boxes if width > 0]
    left, width = max(boxes, key=lambda box: box[1])
    if width > text_width(name, 12):
        x, y, ink = left + width / 2, top + _LANE / 2 - 3, ink_on(color)
        marks.append(text(x, y, name, ink, text_anchor="middle"))
        marks.append(text(x, y + 16, milliseconds, ink, font_size=10.5, text_anchor="middle"))
    return group(f"{name}: {milliseconds}, {span.detail or span.name}", marks)


def _inside(wait: Span, span: Span) -> bool:
    return span.begin <= wait.begin and wait.end <= span.end


def _launches(pair: LayerPair) -> Iterator[Markup]:
    """Yield a line from the launch of each exchange to its start."""
    begins = {span.name: span.begin for span in pair.exchange_spans}
    for launch in pair.launch_spans:
        if launch.name in begins:
            x, y, end = _x(pair, launch.begin), _TOP + _LANE, _x(pair, begins[launch.name])
            yield line(x, y, end, _EXCHANGE, "faint", stroke_width=1.2, stroke_dasharray="3 2")
            yield dot(x, y, 2.6, "faint")


def _legend_marks() -> Iterator[LegendMark]:
    waiting = ((_WAIT, "waiting for an exchange"),)
    meanings = {"F": "forward", "B": "backward: gradients of inputs", "W": "gradients of weights"}
    for color, words in (*((_COLORS[letter], words) for letter, words in meanings.items()), *waiting):
        yield LegendMark(words, [rect(0, 0, 14, 14, color, rx=2)])
    yield LegendMark("launch of an exchange", [dot(7, 7, 2.6, "faint")])
