"""A step that moves in the walk of an MoE layer moves on tensors, in bytes and in seconds."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from typing_extensions import override

from shoestring.comm.trace import NullRecorder, TimelineTrack
from shoestring.launch.planner.layout_memory import workspace_from_shape
from shoestring.launch.planner.stream_simulation import SimulatedChunk, SimulatedStreams
from shoestring.parallelism.pipeline import chunk_walk
from shoestring.parallelism.pipeline.chunk_walk import LayerPart, MoELayerInterpreter, StageShape
from shoestring.parallelism.pipeline.instruction import Resumable, interleave, run_to_completion
from shoestring.parallelism.weight_grad import DelayedWeightGradients
from shoestring.tests.trainer.model.small_chunk import SCALES, make_chunk, window
from shoestring.trainer.memory.chunk import ChunkMemorySimulator, MemoryKind, MeteredChunk, PeakMeter

from .v3 import simulated

STAGE = StageShape(dense_layers=0, moe_layers=4, is_first=False, is_last=False)


class Levels(PeakMeter):
    """Meter that records every change of a level."""

    def __init__(self) -> None:
        super().__init__()
        self.changes: list[tuple[MemoryKind, float]] = []

    def allocate(self, kind: MemoryKind, size: float) -> None:
        self.changes.append((kind, size))
        super().allocate(kind, size)

    def free(self, kind: MemoryKind, size: float) -> None:
        self.changes.append((kind, -size))
        super().free(kind, size)


class Spans(NullRecorder):
    """Recorder that keeps the names of spans."""

    def __init__(self) -> None:
        self.names: list[str] = []

    @override
    def span(self, track: TimelineTrack, name: str, detail: object = None) -> AbstractContextManager[object]:
        self.names.append(name)
        return super().span(track, name, detail)


class WithoutOwnFlush:
    """Interpreter of a layer's steps but for the flush of its own weight gradients."""

    def __init__(self, layer: MoELayerInterpreter) -> None:
        self._layer, self.left_out = layer, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def flush_weight_gradients(self, part: LayerPart) -> None:
        if part is LayerPart.ROUTED_EXPERTS:
            self.left_out += 1
        else:
            self._layer.flush_weight_gradients(part)


def flush_own_last(walk: Callable[[Any], Resumable[None]], layer: MoELayerInterpreter) -> Resumable[None]:
    yield from walk(others := WithoutOwnFlush(layer))
    assert others.left_out == 1
    layer.flush_weight_gradients(LayerPart.ROUTED_EXPERTS)


def computed() -> tuple[list[str], dict[str, torch.Tensor]]:
    """Return the order of spans of a forward and a backward on tensors, and the gradients."""
    spans = Spans()
    chunk, _ = make_chunk(recorder=spans)
    ahead = run_to_completion(chunk.forward(*window(), SCALES))
    run_to_completion(ahead.backward(None, DelayedWeightGradients()))
    grads = {name: weight.grad for name, weight in chunk.model.named_parameters() if weight.grad is not None}
    return spans.names, grads


def weighed() -> list[tuple[MemoryKind, float]]:
    """Return the changes of memory levels in an FB."""
    recipe = (simulation := simulated()).forecast.recipe
    shape = simulation.forecaster.chunk_time_model(simulation.layout, recipe).shape
    meter = Levels()
    chunk = MeteredChunk(ChunkMemorySimulator(STAGE, workspace_from_shape(shape, recipe)), meter)
    run_to_completion(chunk.forward())
    interleave(chunk.backward(deferred=False), chunk.forward())
    return meter.changes


def timed() -> SimulatedStreams:
    """Return the streams after an FB."""
    simulation = simulated()
    own = simulation.forecaster.chunk_time_model(simulation.layout, simulation.forecast.recipe)
    streams = SimulatedStreams()
    chunk = SimulatedChunk(STAGE, own, streams, wait_for_peers=False)
    interleave(chunk.backward(deferred=False), chunk.forward())
    return streams


def test_weight_gradients_that_move_in_the_walk_move_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    (order, grads), levels, streams = computed(), weighed(), timed()
    # From behind the launch of dispatch_backward, which mlp(W) hides, to the end of the layer, where nothing is hidden.
    monkeypatch.setattr(chunk_walk, "_walk_moe_backward", partial(flush_own_last, chunk_walk._walk_moe_backward))
    (moved_order, moved_grads), moved_levels, moved_streams = computed(), weighed(), timed()

    assert order.index("mlp(W)") < order.index("attn(B)")
    assert moved_order.index("mlp(W)") > moved_order.index("attn(B)")
    assert moved_levels != levels
    assert moved_streams.exposed_seconds > streams.exposed_seconds
    assert moved_streams.elapsed_seconds > streams.elapsed_seconds
    for name, grad in grads.items():  # the order changes no result
        assert torch.equal(moved_grads[name], grad), name
