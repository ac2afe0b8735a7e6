"""Order of a chunk's computing, exchanges and weight gradients: an MoE layer's as data, a stage's as generators.

Three interpreters follow it: `trainer/model/chunk.py` executes it on tensors, `trainer/memory/chunk.py` counts its
bytes, and `launch/planner/stream_simulation.py` its seconds.

An MoE layer has five phases: attend | dispatch | experts | combine | merge. A generator hands over after each exchange
that it has launched: `run_to_completion` runs a generator alone, `interleave` runs two, a forward and a backward, so
that one computes while the exchange of the other is in flight (report §3.2.1, figure 4). Interleaved, each hands over
once more per layer: the forward after it launches the second part of its dispatch, the backward after it queues mlp(B),
which hides that part.

A backward computes the gradients of inputs, launches the exchange that needs them, and then flushes delayed weight
gradients.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from .instruction import Resumable
from .program import Op


class LayerPart(StrEnum):
    """Parts of a stage that compute, with their names in timelines."""

    EMBEDDING = "embedding"
    DENSE_LAYER = "dense"
    ATTENTION = "attn"  # with the router
    SHARED_EXPERTS = "shared"
    ROUTED_EXPERTS = "mlp"
    MERGE = "merge"  # a plain sum, so its backward needs no step
    FINAL_NORM = "norm"
    LOSS = "loss"
    MTP_MERGE = "mtp"


def phase_name(part: LayerPart, op: Op) -> str:
    """Return the name of a part's F, B (input gradients) or W (weight gradients) in timelines, such as `attn(F)`."""
    return f"{part}({op})"


class ExchangeOperation(StrEnum):
    """The four operations of `comm.exchange.api.TokenExchange`."""

    DISPATCH = "dispatch"
    COMBINE = "combine"
    COMBINE_BACKWARD = "combine_backward"  # a dispatch of gradients along the cached layout
    DISPATCH_BACKWARD = "dispatch_backward"  # a combine

    @property
    def sends_to_experts(self) -> bool:
        """True if rows go to the experts, false if their sums come back."""
        return self in (ExchangeOperation.DISPATCH, ExchangeOperation.COMBINE_BACKWARD)


@dataclass(frozen=True)
class Compute:
    """Compute a part."""

    part: LayerPart


@dataclass(frozen=True)
class Launch:
    """Launch an exchange; of a dispatch the first part, which exchanges sizes."""

    exchange: ExchangeOperation


@dataclass(frozen=True)
class LaunchSecondPart:
    """Launch the second part of the dispatch, which sends the tokens; without this step the wait launches it."""


@dataclass(frozen=True)
class Wait:
    """Wait for the result of an exchange."""

    exchange: ExchangeOperation


@dataclass(frozen=True)
class FlushWeightGradients:
    """Compute the weight gradients that are pending, unless they are deferred to a W instruction."""

    part: LayerPart
    """Part that most of them belong to; timelines name it."""


Action = Compute | Launch | LaunchSecondPart | Wait | FlushWeightGradients


@dataclass(frozen=True)
class TimelineSpan:
    """Steps that are one span of a timeline. No hand-over is among them: spans of one track do not overlap."""

    part: LayerPart
    steps: tuple[Action, ...]


@dataclass(frozen=True)
class HandOver:
    """Hand over to the other generator, if one is interleaved."""


@dataclass(frozen=True)
class IfInterleaved:
    """Steps that run only while another generator is interleaved."""

    steps: tuple[Action | HandOver, ...]


Step = Action | TimelineSpan | HandOver | IfInterleaved

MOE_FORWARD: tuple[Step, ...] = (
    TimelineSpan(LayerPart.ATTENTION, (Compute(LayerPart.ATTENTION),)),
    Launch(ExchangeOperation.DISPATCH),
    HandOver(),
    # Interleaved, the other micro-batch has queued its mlp(B) by now. The host must wait for sizes before it can launch
    # the second part of the dispatch; waiting earlier would have delayed that mlp(B), which hides this part.
    IfInterleaved((LaunchSecondPart(), HandOver())),
    TimelineSpan(
        LayerPart.ROUTED_EXPERTS,
        (
            # The shared expert needs no exchange: queued first, it computes while the host waits for the sizes.
            Compute(LayerPart.SHARED_EXPERTS),
            Wait(ExchangeOperation.DISPATCH),
            Compute(LayerPart.ROUTED_EXPERTS),
        ),
    ),
    Launch(ExchangeOperation.COMBINE),
    HandOver(),
    Wait(ExchangeOperation.COMBINE),
    Compute(LayerPart.MERGE),
)
"""Forward of an MoE layer. Interleaved, dispatch(F) hides behind mlp(B) and combine(F) behind attn(B)."""

MOE_BACKWARD: tuple[Step, ...] = (
    Launch(ExchangeOperation.COMBINE_BACKWARD),
    # Weight gradients run while an exchange is in flight: attn(W) of the layer above (2.4 ms in DeepSeek's trace) hides
    # this one.
    FlushWeightGradients(LayerPart.ATTENTION),
    HandOver(),
    TimelineSpan(
        LayerPart.ROUTED_EXPERTS,
        (
            Compute(LayerPart.SHARED_EXPERTS),
            Wait(ExchangeOperation.COMBINE_BACKWARD),
            Compute(LayerPart.ROUTED_EXPERTS),
        ),
    ),
    # Interleaved, the other micro-batch launches the second part of its dispatch first: dispatch_backward needs the
    # result of mlp(B), and launched now it would keep that part waiting behind it, with nothing to hide it.
    IfInterleaved((HandOver(),)),
    Launch(ExchangeOperation.DISPATCH_BACKWARD),
    FlushWeightGradients(LayerPart.ROUTED_EXPERTS),
    HandOver(),
    TimelineSpan(LayerPart.ATTENTION, (Wait(ExchangeOperation.DISPATCH_BACKWARD), Compute(LayerPart.ATTENTION))),
)
"""Backward of an MoE layer: its phases in reverse. Input gradients; weight gradients wait for the next flush."""


class MoELayerInterpreter(Protocol):
    """Meaning of the steps of one MoE layer, in one direction. It is dropped when the layer is done."""

    def compute(self, part: LayerPart) -> None:
        """Compute a part."""
        ...

    def launch(self, exchange: ExchangeOperation) -> None:
        """Launch an exchange."""
        ...

    def launch_second_part(self) -> None:
        """Launch the second part of the dispatch. A backward has none."""
        return

    def wait(self, exchange: ExchangeOperation) -> None:
        """Wait for an exchange."""
        ...

    def flush_weight_gradients(self, part: LayerPart) -> None:
        """Compute pending weight gradients. A forward has none."""
        return

    def span(self, part: LayerPart) -> AbstractContextManager[object]:
        """Return the context of steps that are one span of a timeline."""
        return nullcontext()


class ChunkInterpreter(Protocol):
    """Meaning of a stage's parts, in one direction."""

    def compute(self, part: LayerPart, index: int) -> None:
        """Compute a part outside of MoE layers.

        `index` is the place of a dense layer in the stage; for norm, loss and MTP merge the depth, 0 for the main
        model's.
        """
        ...

    def moe_layer(self, place: int) -> MoELayerInterpreter:
        """Begin an MoE layer. `place` counts the stage's layers from the lowest; MTP modules follow the last one."""
        ...

    def flush_weight_gradients(self, part: LayerPart) -> None:
        """Compute pending weight gradients. A forward has none."""
        return


@dataclass(frozen=True)
class StageShape:
    """Numbers of layers of a stage, and the position of the stage; they determine its time and memory."""

    dense_layers: int
    moe_layers: int
    is_first: bool
    is_last: bool

    @property
    def layers(self) -> int:
        """Number of layers, which is the place of the first MTP module."""
        return self.dense_layers + self.moe_layers


def walk_forward(stage: StageShape, mtp_modules: int, chunk: ChunkInterpreter) -> Resumable[None]:
    """Run the stage's layers; on the last stage also the loss of the main model, and the MTP modules with theirs."""
    yield from walk_main_forward(stage, chunk)
    if stage.is_last:
        chunk.compute(LayerPart.LOSS, 0)
        for depth in range(1, mtp_modules + 1):
            yield from walk_mtp_forward(stage, depth, chunk)
            chunk.compute(LayerPart.LOSS, depth)


def walk_main_forward(stage: StageShape, chunk: ChunkInterpreter) -> Resumable[None]:
    """Run the main model's layers, after the embedding on the first stage and with the final norm on the last."""
    if stage.is_first:
        chunk.compute(LayerPart.EMBEDDING, 0)
    for place in range(stage.dense_layers):
        chunk.compute(LayerPart.DENSE_LAYER, place)
    for place in range(stage.dense_layers, stage.layers):
        yield from _walk_layer(MOE_FORWARD, chunk.moe_layer(place))
    if stage.is_last:
        chunk.compute(LayerPart.FINAL_NORM, 0)


def walk_mtp_forward(stage: StageShape, depth: int, chunk: ChunkInterpreter) -> Resumable[None]:
    """Run one MTP module: from the hidden state of the depth before to that of `depth`, which counts from 1."""
    chunk.compute(LayerPart.MTP_MERGE, depth)
    yield from _walk_layer(MOE_FORWARD, chunk.moe_layer(stage.layers + depth - 1))
    chunk.compute(LayerPart.FINAL_NORM, depth)


def walk_backward(stage: StageShape, mtp_modules: int, chunk: ChunkInterpreter) -> Resumable[None]:
    """Run the backward of what `walk_forward` ran."""
    if stage.is_last:
        # All losses first, at no cost: the cross-entropy computed its input gradients in the forward. Then from the
        # deepest MTP module back to the main model, where each depth's hidden state also gets its loss's gradient.
        for depth in range(mtp_modules + 1):
            chunk.compute(LayerPart.LOSS, depth)
        for depth in range(mtp_modules, 0, -1):
            chunk.compute(LayerPart.FINAL_NORM, depth)
            yield from _walk_layer(MOE_BACKWARD, chunk.moe_layer(stage.layers + depth - 1))
            chunk.compute(LayerPart.MTP_MERGE, depth)
        chunk.compute(LayerPart.FINAL_NORM, 0)
    for place in reversed(range(stage.dense_layers, stage.layers)):
        yield from _walk_layer(MOE_BACKWARD, chunk.moe_layer(place))
    for place in reversed(range(stage.dense_layers)):
        chunk.compute(LayerPart.DENSE_LAYER, place)
    if stage.is_first:
        chunk.compute(LayerPart.EMBEDDING, 0)
    # The attention weights of the lowest layer have no exchange left to hide behind.
    chunk.flush_weight_gradients(LayerPart.ATTENTION)


def _walk_layer(steps: tuple[Step, ...], layer: MoELayerInterpreter) -> Resumable[None]:
    is_interleaved: bool | None = False
    for step in steps:
        if isinstance(step, HandOver):
            is_interleaved = yield
        elif not isinstance(step, IfInterleaved):
            _run_step(step, layer)
        elif is_interleaved:
            yield from _walk_layer(step.steps, layer)


def _run_step(step: Action | TimelineSpan, layer: MoELayerInterpreter) -> None:
    match step:
        case Compute(part):
            layer.compute(part)
        case Launch(exchange):
            layer.launch(exchange)
        case LaunchSecondPart():
            layer.launch_second_part()
        case Wait(exchange):
            layer.wait(exchange)
        case FlushWeightGradients(part):
            layer.flush_weight_gradients(part)
        case TimelineSpan(part, inner):
            with layer.span(part):
                for each in inner:
                    _run_step(each, layer)
