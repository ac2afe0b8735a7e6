"""The order in which a forward and a backward alternate, against the published trace of DeepSeek-V3's training."""

from contextlib import closing
from dataclasses import replace
from datetime import timedelta

import pytest
import torch

from shoestring.comm.async_comm import build_async_communicator
from shoestring.comm.groups import ProcessGroups
from shoestring.comm.trace import TimelineTrack
from shoestring.tests.comm.recorded_streams import RecordedStreams
from shoestring.tests.parity.layouts import Layout
from shoestring.tests.parity.runner import build, take_step
from shoestring.tests.processes import World, run_processes
from shoestring.trainer.telemetry.trace import Span, TraceRecorder

LAYOUT = Layout(2, 1, 4, 0, schedule="dualpipev", layers=7, dtype=torch.float32)

# One layer pair (the second) of deepseek-ai/profile-data, train.json: start and end in microseconds of what ran on the
# compute streams and on the communication stream, and where the next pair's combine(B) starts.
PUBLISHED = {
    "combine(B)": (29908, 35135),
    "attn(F)": (32291, 36684),
    "mlp(B)": (36686, 42153),
    "dispatch(F)": (36709, 42455),
    "dispatch(B)": (42465, 50377),
    "mlp(W)": (42155, 47214),
    "mlp(F)": (47217, 51637),
    "attn(B)": (51640, 61203),
    "attn(W)": (61205, 63595),
    "combine(F)": (51640, 59902),
}
OURS = {
    "dispatch of": "dispatch(F)",
    "combine of": "combine(F)",
    "combine_backward of": "combine(B)",
    "dispatch_backward of": "dispatch(B)",
}


def published_order() -> list[str]:
    """Return the compute in order; each communication directly after the phase that had to end before it."""
    computed = sorted((name for name in PUBLISHED if name[:4] in ("attn", "mlp(")), key=lambda name: PUBLISHED[name])
    order = list(computed)
    for name in ("dispatch(F)", "dispatch(B)", "combine(F)"):
        ended = [other for other in computed if PUBLISHED[other][1] <= PUBLISHED[name][0]]
        order.insert(order.index(ended[-1]) + 1, name)
    # combine(B) starts as soon as the attn(B) of the pair before it has ended, which is before this pair's attn(F).
    return ["combine(B)", *order]


def recorded(world: World, layout: Layout, on_streams: bool) -> list[str]:
    """Return the operations of the computing thread in one FB of the steady state; with stand-in streams like a GPU."""
    stages = layout.stages
    groups = ProcessGroups.create(layout.topology, world.rank, timedelta(seconds=60), stages.replica_pp_groups())
    trace = TraceRecorder(nvtx=False)
    streams = RecordedStreams() if on_streams else None
    with closing(build_async_communicator(groups.ep, torch.device("cpu"), recorder=trace, streams=streams)) as worker:
        stepper, gradients = build(layout, stages, groups, worker, trace)
        trace.is_recording = True
        take_step(stepper, gradients, layout, 0, world.rank)
    pairs = [span for span in trace.spans if span.track is TimelineTrack.INSTRUCTION and span.name == "FB"]
    return order_inside(pairs[len(pairs) // 2], trace.spans)


def order_inside(pair: Span, spans: list[Span]) -> list[str]:
    inside = [span for span in spans if pair.begin <= span.begin and span.end <= pair.end]
    inside.sort(key=lambda span: span.begin)
    order = []
    for span in inside:
        if span.track is TimelineTrack.COMPUTE and span.name[:4] in ("attn", "mlp("):
            order.append(span.name)
        elif span.track is TimelineTrack.LAUNCH:
            order += [ours for prefix, ours in OURS.items() if span.name.startswith(prefix)]
    return order


@pytest.mark.parametrize("on_streams", [False, True], ids=["threads", "streams"])
def test_one_layer_pair_is_in_the_published_order_on_all_ranks(on_streams: bool) -> None:
    first, second = run_processes(2, recorded, LAYOUT, on_streams)
    assert first == second
    pair = published_order()
    # The weights of attention are computed behind the next pair's combine(B), which waits for nothing but attn(B).
    body = [*pair[:-1], "combine(B)", "attn(W)"][1:]
    begin = first.index("combine(B)")
    assert len(pair) == 10
    assert first[begin : begin + 10] == ["combine(B)", *body][:10]
    assert first[begin + 9 : begin + 11] == ["combine(B)", "attn(W)"]


def test_without_overlap_a_forward_is_over_before_the_backward_begins() -> None:
    for order in run_processes(2, recorded, replace(LAYOUT, overlap=False), False):
        forward, backward = order[: order.index("combine(B)")], order[order.index("combine(B)") :]
        assert {name[-2] for name in forward} == {"F"}
        assert {name[-2] for name in backward} == {"B", "W"}
