"""The public trace of DeepSeek-V3: its layer pair and its exposed communication."""

import pytest

from shoestring.comm.trace import EXPOSED_ALL_TO_ALL, TimelineTrack
from shoestring.launch.planner.published import (
    TRACED_CHUNK_PAIR_SECONDS,
    exposed_communication_share,
    simulate_traced_chunk_pair,
)
from shoestring.tests.launch.planner.v3 import costs


def test_the_traced_pair_and_its_exposed_communication() -> None:
    lanes = simulate_traced_chunk_pair(costs())
    assert lanes.elapsed_seconds == pytest.approx(TRACED_CHUNK_PAIR_SECONDS, rel=0.05)
    assert 0.02 < exposed_communication_share(lanes) < 0.06


def test_the_order_is_that_of_the_trace() -> None:
    """Rows of one layer pair in the public trace, by start time."""
    lanes = simulate_traced_chunk_pair(costs())
    spans = sorted(lanes.spans, key=lambda span: span.begin)
    compute = [s.name for s in spans if s.track is TimelineTrack.COMPUTE and "shared" not in s.name]
    exchange = [s.name for s in spans if s.track is TimelineTrack.EXCHANGE]
    expected = ["attn(F)", "mlp(B)", "mlp(W)", "mlp(F)", "attn(B)", "attn(W)"]
    assert [name for name in compute if name != EXPOSED_ALL_TO_ALL] == expected * 4
    assert exchange == ["combine_backward", "dispatch", "dispatch_backward", "combine"] * 4


def test_a_look_at_the_traced_pair_changes_no_forecast() -> None:
    own = costs()
    before = dict(own.compute_model.coverage.seconds_by_evidence)
    simulate_traced_chunk_pair(own)
    assert own.compute_model.coverage.seconds_by_evidence == before
