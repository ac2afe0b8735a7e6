"""When the host waits for the sizes of a dispatch, the device has other work queued."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from shoestring.comm.async_comm import StreamCommunicator, TwoPartWork
from shoestring.comm.exchange.config import ExchangeConfig
from shoestring.comm.exchange.factory import build_token_exchange
from shoestring.comm.groups import ProcessGroups
from shoestring.comm.topology import Topology
from shoestring.comm.traffic import TrafficCounter
from shoestring.parallelism.pipeline.instruction import interleave, run_to_completion
from shoestring.parallelism.weight_grad import DelayedWeightGradients
from shoestring.tests.comm.recorded_streams import HOST_WAITS, REST, RecordedStreams
from shoestring.trainer.model.chunk import Chunk
from shoestring.trainer.model.layer import MoELayer
from shoestring.trainer.model.model import Model, initialize_weights

from .small_chunk import CONFIG, SCALES, window

T = TypeVar("T")
LAYERS = ("layer_01", "layer_02", "mtp_01")
BACKWARD, FORWARD = 0, 1  # the micro-batches of an FB
SHARED = "shared(F)"


class StalledWorker(StreamCommunicator):
    """A communicator that waits for sizes as soon as their exchange is launched."""

    def submit_two_part(
        self, what: str, first: Callable[[], Callable[[], T]], inputs: Sequence[Tensor]
    ) -> TwoPartWork[T]:
        pending = super().submit_two_part(what, first, inputs)
        pending.launch_second_part()
        return pending


def make_chunk(exchange: str, worker: type[StreamCommunicator] = StreamCommunicator) -> tuple[Chunk, RecordedStreams]:
    streams, model = RecordedStreams(), Model(CONFIG)
    initialize_weights(model, seed=0)
    layer = model.layers["1"]
    assert isinstance(layer, MoELayer)
    assert layer.shared is not None

    def note_shared(*_: object) -> None:
        with streams.queue(SHARED):
            pass

    layer.shared.register_forward_hook(note_shared)
    groups, config = ProcessGroups.create(Topology(), 0, timedelta(seconds=1)), ExchangeConfig(name=exchange)
    on_streams = worker(streams, recorder=streams)
    exchanger = build_token_exchange(config, groups, CONFIG.n_routed_experts, on_streams, TrafficCounter(Topology(), 0))
    return Chunk(model, exchanger, torch.float32, recorder=streams), streams


def run_pair(exchange: str, worker: type[StreamCommunicator] = StreamCommunicator) -> RecordedStreams:
    """Run an FB; return the streams with the log of the host."""
    chunk, streams = make_chunk(exchange, worker)
    ahead = run_to_completion(chunk.forward(*window(), SCALES, BACKWARD))
    streams.diary.clear()
    streams.host_waits_for.clear()
    interleave(ahead.backward(None, DelayedWeightGradients()), chunk.forward(*window(), SCALES, FORWARD))
    return streams


def of(name: str, layer: str, micro_batch: int) -> str:
    return f"{name} of {layer}, micro-batch {micro_batch}"


def pairs() -> list[tuple[str, str]]:
    """Return the pairs of layers whose backward and forward alternate."""
    return list(zip(reversed(LAYERS), LAYERS, strict=True))


def expected_order() -> list[str]:
    order: list[str] = []
    for backward, forward in pairs():
        order += [
            of("combine_backward", backward, BACKWARD),
            of("attn(F)", forward, FORWARD),
            of("dispatch", forward, FORWARD),
            of("mlp(B)", backward, BACKWARD),
            HOST_WAITS,
            of(f"{REST}dispatch", forward, FORWARD),
            of("dispatch_backward", backward, BACKWARD),
            of("mlp(F)", forward, FORWARD),
            of("combine", forward, FORWARD),
            of("attn(B)", backward, BACKWARD),
        ]
    return order


def order_of(streams: RecordedStreams) -> list[str]:
    return [entry for entry in streams.diary if entry == HOST_WAITS or "micro-batch" in entry]


@pytest.mark.parametrize("exchange", ["flat", "two_hop"])
def test_the_host_waits_for_sizes_when_the_backward_has_queued_what_hides_the_dispatch(exchange: str) -> None:
    assert order_of(run_pair(exchange)) == expected_order()


@pytest.mark.parametrize("exchange", ["flat", "two_hop"])
def test_a_wait_right_behind_the_launch_is_seen(exchange: str) -> None:
    order = order_of(run_pair(exchange, StalledWorker))
    assert order != expected_order()
    assert order.index(HOST_WAITS) < order.index(of("mlp(B)", LAYERS[-1], BACKWARD))


@pytest.mark.parametrize("exchange", ["flat", "two_hop"])
def test_a_dispatch_runs_during_the_backward_that_hides_it(exchange: str) -> None:
    streams = run_pair(exchange)
    for (backward, forward), waited in zip(pairs(), streams.host_waits_for, strict=True):
        hiding = of("mlp(B)", backward, BACKWARD)
        assert of("attn(F)", forward, FORWARD) in waited
        assert hiding not in waited
        assert hiding not in streams.needs[of(f"{REST}dispatch", forward, FORWARD)]
        assert hiding in streams.needs[of("dispatch_backward", backward, BACKWARD)]
        assert of(f"{REST}dispatch", forward, FORWARD) in streams.needs[of("mlp(F)", forward, FORWARD)]


@pytest.mark.parametrize("exchange", ["flat", "two_hop"])
def test_alone_the_shared_expert_runs_while_sizes_travel(exchange: str) -> None:
    chunk, streams = make_chunk(exchange)
    run_to_completion(chunk.forward(*window(), SCALES, FORWARD))
    begin = streams.diary.index(of("dispatch", LAYERS[0], FORWARD))
    rest = of(f"{REST}dispatch", LAYERS[0], FORWARD)
    assert streams.diary[begin + 1 : begin + 4] == [SHARED, HOST_WAITS, rest]
    assert SHARED not in streams.needs[rest]
