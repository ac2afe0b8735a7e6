"""The picture of one pair of layers shows what the trace holds, to scale."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from shoestring.comm.trace import EXPOSED_EXCHANGE, Track
from shoestring.launch.report.trace_svg import PHASES, layer_pairs, svg_layer_pair
from shoestring.trainer.telemetry.trace import Span, merge_ranks, read_trace, write_rank

MS = 1_000_000
FORWARD, BACKWARD = "layer_02, micro-batch 3", "layer_05, micro-batch 1"


def pair_spans(start: int, scale: int) -> list[Span]:
    """One pair of 60 times `scale` milliseconds, in which attn(F) waits for half of its time."""
    unit, of = scale * MS, {"F": FORWARD, "B": BACKWARD, "W": BACKWARD}
    begins = {name: start + 10 * index * unit for index, name in enumerate(PHASES)}
    spans = [Span(Track.COMPUTE, name, of[name[-2]], begin, begin + 10 * unit) for name, begin in begins.items()]
    spans += [
        Span(Track.LAUNCH, f"combine_backward of {BACKWARD}", "", start, start),
        Span(Track.EXCHANGE, f"combine_backward of {BACKWARD}", "", start, start + 15 * unit),
        Span(Track.COMPUTE, EXPOSED_EXCHANGE, BACKWARD, start + 10 * unit, start + 15 * unit),
        Span(Track.LAUNCH, f"dispatch of {FORWARD}", "", start + 10 * unit, start + 10 * unit),
        Span(Track.EXCHANGE, f"dispatch of {FORWARD}", "", start + 15 * unit, start + 25 * unit),
    ]
    return spans


def trace() -> list[Span]:
    """One FB of three pairs, and one more that lacks its end; a forward alone."""
    pairs = [*pair_spans(0, 1), *pair_spans(60 * MS, 3), *pair_spans(240 * MS, 2)]
    unfinished = [
        Span(Track.LAUNCH, f"combine_backward of {BACKWARD}", "", 360 * MS, 360 * MS),
        Span(Track.COMPUTE, "attn(W)", BACKWARD, 360 * MS, 370 * MS),
    ]
    unfinished += [  # and one with a dense layer in it
        Span(Track.LAUNCH, f"combine_backward of {BACKWARD}", "", 372 * MS, 372 * MS),
        *(Span(Track.COMPUTE, name, FORWARD, 373 * MS, 374 * MS) for name in ("dense(F)", *PHASES)),
        Span(Track.LAUNCH, f"combine_backward of {BACKWARD}", "", 378 * MS, 378 * MS),
    ]
    alone = [
        Span(Track.INSTRUCTION, "F", "", 400 * MS, 410 * MS),
        Span(Track.COMPUTE, "attn(F)", FORWARD, 401 * MS, 402 * MS),
    ]
    return [Span(Track.INSTRUCTION, "FB", "FB", 0, 380 * MS), *pairs, *unfinished, *alone]


def test_every_whole_pair_is_found() -> None:
    pairs = list(layer_pairs(0, trace()))
    assert [pair.length // MS for pair in pairs] == [60, 180, 120]
    assert [pair.waited // MS for pair in pairs] == [5, 15, 10]
    assert [len(pair.exchanged) for pair in pairs] == [2, 2, 2]


def test_the_picture_is_that_of_median_length_and_to_scale() -> None:
    root = ElementTree.fromstring(svg_layer_pair({1: trace()}))
    text = " ".join(element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text"))
    assert "120.0 ms, 8 % of it waiting" in text
    assert all(part in text for part in (FORWARD, BACKWARD, "rank 1", "of 3 in this trace"))
    boxes = {}
    for group in root.iter("{http://www.w3.org/2000/svg}g"):
        title, box = group[0].text, group[1]
        assert title is not None
        boxes[title.partition(":")[0]] = (float(box.attrib["x"]), float(box.attrib["width"]))
    assert boxes.keys() == {*PHASES, "combine(B)", "dispatch(F)"}
    left, unit = boxes["attn(W)"][0], boxes["attn(W)"][1] + 1  # half a pixel of air at each end
    assert boxes.pop("attn(F)") == pytest.approx((left + 1.5 * unit, 0.5 * unit - 1), abs=0.02)  # when it has waited
    for index, name in enumerate(PHASES):
        if name != "attn(F)":
            assert boxes[name] == pytest.approx((left + index * unit, unit - 1), abs=0.02)
    assert boxes["combine(B)"] == pytest.approx((left, 1.5 * unit - 1), abs=0.02)
    assert boxes["dispatch(F)"] == pytest.approx((left + 1.5 * unit, unit - 1), abs=0.02)


def test_a_trace_without_pairs_is_not_drawn() -> None:
    with pytest.raises(ValueError, match="no FB"):
        svg_layer_pair({0: [span for span in trace() if span.name != "mlp(W)"]})


def test_a_merged_file_is_read_back(tmp_path: Path) -> None:
    for rank in range(2):
        write_rank(tmp_path, rank, trace())
    ranks = read_trace(merge_ranks(tmp_path, 2))
    assert ranks.keys() == {0, 1}
    for spans in ranks.values():
        # Only where time begins differs, by what it took to write the other rank's file. The file's unit is 1 µs.
        assert written(spans) == written(trace())


def written(spans: list[Span]) -> set[tuple[Track, str, str, int, int]]:
    start = min(span.begin for span in spans)
    return {(s.track, s.name, s.detail, round((s.begin - start) / 1e3), round((s.end - start) / 1e3)) for s in spans}
