"""One rank of `shoestring calibrate`: the phases of a step are separated."""

from datetime import timedelta
from types import SimpleNamespace

from shoestring.comm.groups import ProcessGroups
from shoestring.comm.topology import Topology
from shoestring.comm.trace import EXPOSED_ALL_TO_ALL, TimelineTrack
from shoestring.launch.bench.calibrate_rank import Calibration, phase_seconds_from_spans
from shoestring.launch.compose import compose_run_config
from shoestring.trainer.telemetry.trace import Span

THREE_FLUSHES = ["model.num_hidden_layers=3", "model.first_k_dense_replace=1", "model.num_nextn_predict_layers=1"]


def spans(track: TimelineTrack, *named: tuple[str, int]) -> list[Span]:
    """Return consecutive spans; lengths in seconds."""
    found, now = [], 0
    for name, seconds in named:
        found.append(Span(track, name, "", now, now + seconds * 10**9))
        now += seconds * 10**9
    return found


def test_weight_gradients_are_attributed_by_the_order_of_their_flushes() -> None:
    """A dense layer, two routed ones and MTP, in the order of a recorded backward."""
    config = compose_run_config(THREE_FLUSHES)
    backward = [("attn(W)", 7), ("attn(W)", 2), ("attn(W)", 5)]  # MTP, layer 2, layer 1 and 0
    inner = spans(TimelineTrack.COMPUTE, ("attn(F)", 3), ("attn(F)", 5), ("mlp(F)", 4), *backward)
    whole = Span(TimelineTrack.INSTRUCTION, "B", "", inner[3].begin, inner[-1].end + 8 * 10**9)
    seconds = phase_seconds_from_spans([*inner, whole], config)
    assert seconds["attn(F)"] == 4
    assert seconds["loss(W)"] == 0  # in the forward
    assert seconds["attn(W)"] == 2
    assert seconds["mtp(W)"] == 5
    assert seconds["dense(W)"] == 3
    assert seconds["loss(B)"] == 4  # time outside the spans, over two losses


def test_waiting_for_an_exchange_is_no_computing() -> None:
    config = compose_run_config(THREE_FLUSHES)
    (experts,) = spans(TimelineTrack.COMPUTE, ("mlp(F)", 10))
    settle = spans(TimelineTrack.COMPUTE, *[("attn(W)", 1)] * 3)
    wait = Span(TimelineTrack.COMPUTE, EXPOSED_ALL_TO_ALL, "", 2 * 10**9, 5 * 10**9)
    assert phase_seconds_from_spans([experts, wait, *settle], config)["mlp(F)"] == 7


def test_exchanges_are_timed_in_groups_of_every_size() -> None:
    """Otherwise the quickstart, 2 x 2 ranks, could not be priced after a calibration on four."""
    of_four = SimpleNamespace(world=SimpleNamespace(size=4))
    calibration = Calibration(compose_run_config([]), of_four, 1)  # type: ignore[arg-type]
    assert calibration.exchange_group_sizes == [1, 2, 4]


def test_a_real_step_has_the_flushes_that_are_attributed() -> None:
    """One rank measures itself; a span too many or too few would raise `ValueError`."""
    config = compose_run_config([*THREE_FLUSHES, "training.sequence_length=16", "training.global_batch_size=2"])
    alone = ProcessGroups.create(Topology(), 0, timedelta(seconds=1))
    seconds = {row.name: row.value for row in Calibration(config, alone, repeats=1).measure_rows() if row.unit == "us"}
    assert seconds["attn(W)"] > 0
    assert seconds["loss(W)"] == 0
