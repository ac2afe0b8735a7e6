"""The picture of a layer pair shows the trace to scale."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from shoestring.comm.trace import TimelineTrack
from shoestring.launch.report.trace_svg import LAYER_PAIR_PHASES, find_layer_pairs, svg_layer_pair
from shoestring.tests.launch.report.layer_spans import BACKWARD, FORWARD, MS, trace
from shoestring.trainer.telemetry.trace import Span, merge_rank_traces, read_trace, write_rank_trace


def test_every_whole_pair_is_found() -> None:
    pairs = list(find_layer_pairs(0, trace()))
    assert [pair.duration_ns // MS for pair in pairs] == [60, 180, 120]
    assert [pair.wait_ns // MS for pair in pairs] == [5, 15, 10]
    assert [len(pair.exchange_spans) for pair in pairs] == [2, 2, 2]


def test_the_picture_is_that_of_median_length_and_to_scale() -> None:
    root = ElementTree.fromstring(svg_layer_pair({1: trace()}))
    text = " ".join(element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text"))
    assert "120.0 ms, 8 % of it waiting" in text
    assert all(part in text for part in (FORWARD, BACKWARD, "rank 1", "of 3 in this trace"))
    boxes = {}
    for group in root.findall("{http://www.w3.org/2000/svg}g[{http://www.w3.org/2000/svg}title]"):
        title, box = group[0].text, group[1]
        assert title is not None
        boxes[title.partition(":")[0]] = (float(box.attrib["x"]), float(box.attrib["width"]))
    assert boxes.keys() == {*LAYER_PAIR_PHASES, "combine(B)", "dispatch(F)"}
    left, unit = boxes["attn(W)"][0], boxes["attn(W)"][1] + 1  # half a pixel of margin at each end
    assert boxes.pop("attn(F)") == pytest.approx((left + 1.5 * unit, 0.5 * unit - 1), abs=0.02)  # when it has waited
    for index, name in enumerate(LAYER_PAIR_PHASES):
        if name != "attn(F)":
            assert boxes[name] == pytest.approx((left + index * unit, unit - 1), abs=0.02)
    assert boxes["combine(B)"] == pytest.approx((left, 1.5 * unit - 1), abs=0.02)
    assert boxes["dispatch(F)"] == pytest.approx((left + 1.5 * unit, unit - 1), abs=0.02)


def test_a_trace_without_pairs_is_not_drawn() -> None:
    with pytest.raises(ValueError, match="no overlapped pair of MoE layers: a dense layer or a loss"):
        svg_layer_pair({0: [span for span in trace() if span.name != "mlp(W)"]})


def test_a_merged_file_is_read_back(tmp_path: Path) -> None:
    for rank in range(2):
        write_rank_trace(tmp_path, rank, trace())
    ranks = read_trace(merge_rank_traces(tmp_path, 2))
    assert ranks.keys() == {0, 1}
    for spans in ranks.values():
        # Only the origin of time differs, by the time it took to write the other rank's file. The file's unit is 1 µs.
        assert written(spans) == written(trace())


def written(spans: list[Span]) -> set[tuple[TimelineTrack, str, str, int, int]]:
    start = min(span.begin for span in spans)
    return {(s.track, s.name, s.detail, round((s.begin - start) / 1e3), round((s.end - start) / 1e3)) for s in spans}
