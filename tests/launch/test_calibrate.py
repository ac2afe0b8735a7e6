"""`shoestring calibrate`: the phases of a step told apart, and a table that the planner prices with."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoestring.comm.record import EXPOSED_EXCHANGE, Track
from shoestring.launch.calibrate import calibrate
from shoestring.launch.calibrate_rank import phase_seconds
from shoestring.launch.compose import compose_run
from shoestring.launch.planner.tables import read_table
from shoestring.launch.simulate import simulate
from shoestring.tests.launch.refusals import refused
from shoestring.trainer.telemetry.trace import Span


def spans(track: Track, *named: tuple[str, int]) -> list[Span]:
    """One after the other; lengths in seconds."""
    found, now = [], 0
    for name, seconds in named:
        found.append(Span(track, name, "", now, now + seconds * 10**9))
        now += seconds * 10**9
    return found


def test_weights_are_told_apart_by_the_moment_they_are_settled() -> None:
    """A dense layer, two routed ones and MTP, as the tape of a backward has them."""
    config = compose_run(["model.layers=3", "model.dense_layers=1", "model.mtp_depth=1"])
    backward = [("attn(W)", 6), ("attn(W)", 7), ("attn(W)", 2), ("attn(W)", 5)]  # losses, MTP, layer 2, layer 1 and 0
    inner = spans(Track.COMPUTE, ("attn(F)", 3), ("attn(F)", 5), ("mlp(F)", 4), *backward)
    whole = Span(Track.INSTRUCTION, "B", "", inner[3].begin, inner[-1].end + 8 * 10**9)
    seconds = phase_seconds([*inner, whole], config)
    assert seconds["attn(F)"] == 4
    assert seconds["loss(W)"] == 3  # of two losses
    assert seconds["attn(W)"] == 2
    assert seconds["mtp(W)"] == 5
    assert seconds["dense(W)"] == 3
    assert seconds["loss(B)"] == 4  # what is in no span, over two losses


def test_waiting_for_an_exchange_is_no_computing() -> None:
    config = compose_run([])
    (experts,) = spans(Track.COMPUTE, ("mlp(F)", 10))
    settle = spans(Track.COMPUTE, *[("attn(W)", 1)] * 4)
    wait = Span(Track.COMPUTE, EXPOSED_EXCHANGE, "", 2 * 10**9, 5 * 10**9)
    assert phase_seconds([experts, wait, *settle], config)["mlp(F)"] == 7


def test_impossible_numbers_are_refused_before_a_process_starts(tmp_path: Path) -> None:
    found = refused(lambda: calibrate([], None, tmp_path / "out", ranks=0, repeats=0))
    assert set(found) == {"--ranks", "--repeats"}
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_calibrated_machine_prices_the_layouts_of_its_ranks(tmp_path: Path) -> None:
    small = ["model.layers=2", "training.sequence_length=32", "training.global_batch=4"]
    cluster = calibrate(small, None, tmp_path, ranks=2, repeats=2)
    assert cluster == tmp_path / "cluster" / "measured.yaml"
    assert {row.evidence for row in read_table(str(tmp_path / "measured.csv")).rows} == {"measured"}
    for layout in (["topology.edp=2"], ["topology.ep=2"], ["topology.pp=2"], ["topology.pp=2", "schedule=zb1p"]):
        forecast = simulate([*small, *layout, "cluster=measured"], tmp_path, {}).forecast
        assert not forecast.coverage.misses
        assert set(forecast.coverage.seconds) == {"measured"}
        assert 1e-3 < forecast.seconds < 60
