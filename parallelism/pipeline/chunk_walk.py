"""Order of a chunk's computing, exchanges and weight gradients, as generators.

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


class MoELayerInterpreter(Protocol):
    """Meaning of the steps of one MoE layer, in one direction. It is dropped when the layer is done."""

    def compute(self, part: LayerPart) -> None:
        """Compute a part."""
        ...

    def launch(self, exchange: ExchangeOperation) -> None:
        """Launch an exchange; of a dispatch the first part, which exchanges sizes."""
        ...

    def launch_second_part(self) -> None:
        """Launch the second part of the dispatch, which sends the tokens; else the wait launches it.

        A backward has none.
        """
        return

    def wait(self, exchange: ExchangeOperation) -> None:
        """Wait for an exchange."""
        ...

    def flush_weight_gradients(self, part: LayerPart) -> None:
        """Compute the weight gradients that are pending, unless they are deferred to a W instruction.

        Timelines name `part`, to which most of them belong. A forward has none.
        """
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
        yield from _walk_moe_forward(chunk.moe_layer(place))
    if stage.is_last:
        chunk.compute(LayerPart.FINAL_NORM, 0)


def walk_mtp_forward(stage: StageShape, depth: int, chunk: ChunkInterpreter) -> Resumable[None]:
    """Run one MTP module: from the hidden state of the depth before to that of `depth`, which counts from 1."""
    chunk.compute(LayerPart.MTP_MERGE, depth)
    yield from _walk_moe_forward(chunk.moe_layer(stage.layers + depth - 1))
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
            yield from _walk_moe_backward(chunk.moe_layer(stage.layers + depth - 1))
            chunk.compute(LayerPart.MTP_MERGE, depth)
        chunk.compute(LayerPart.FINAL_NORM, 0)
    for place in reversed(range(stage.dense_layers, stage.layers)):
        yield from _walk_moe_backward(chunk.moe_layer(place))
    for place in reversed(range(stage.dense_layers)):
        chunk.compute(LayerPart.DENSE_LAYER, place)
    if stage.is_first:
        chunk.compute(LayerPart.EMBEDDING, 0)
    # The attention weights of the lowest layer have no exchange left to hide behind.
    chunk.flush_weight_gradients(LayerPart.ATTENTION)


def _walk_moe_forward(layer: MoELayerInterpreter) -> Resumable[None]:
    """Run the forward of an MoE layer. Interleaved, dispatch(F) hides behind mlp(B) and combine(F) behind attn(B)."""
    # No hand-over is inside a span: spans of one track do not overlap.
    with layer.span(LayerPart.ATTENTION):
        layer.compute(LayerPart.ATTENTION)
    layer.launch(ExchangeOperation.DISPATCH)
    is_interleaved = yield
    if is_interleaved:
        # The other micro-batch has queued its mlp(B) by now. The host must wait for sizes before it can launch the
        # second part of the dispatch; waiting earlier would have delayed that mlp(B), which hides this part.
        layer.launch_second_part()
        yield
    with layer.span(LayerPart.ROUTED_EXPERTS):
        # The shared expert needs no exchange: queued first, it computes while the host waits for the sizes.
        layer.compute(LayerPart.SHARED_EXPERTS)
        layer.wait(ExchangeOperation.DISPATCH)
        layer.compute(LayerPart.ROUTED_EXPERTS)
    layer.launch(ExchangeOperation.COMBINE)
    yield
    layer.wait(ExchangeOperation.COMBINE)
    layer.compute(LayerPart.MERGE)


def _walk_moe_backward(layer: MoELayerInterpreter) -> Resumable[None]:
    """Run the backward of an MoE layer: its phases in reverse. Weight gradients wait for the next flush."""
    layer.launch(ExchangeOperation.COMBINE_BACKWARD)
    # Weight gradients run while an exchange is in flight: attn(W) of the layer above (2.4 ms in DeepSeek's trace) hides
    # this one.
    layer.flush_weight_gradients(LayerPart.ATTENTION)
    is_interleaved = yield
    with layer.span(LayerPart.ROUTED_EXPERTS):
        layer.compute(LayerPart.SHARED_EXPERTS)
        layer.wait(ExchangeOperation.COMBINE_BACKWARD)
        layer.compute(LayerPart.ROUTED_EXPERTS)
    if is_interleaved:
        # The other micro-batch launches the second part of its dispatch first: dispatch_backward needs the result of
        # mlp(B), and launched now it would keep that part waiting behind it, with nothing to hide it.
        yield
    layer.launch(ExchangeOperation.DISPATCH_BACKWARD)
    layer.flush_weight_gradients(LayerPart.ROUTED_EXPERTS)
    yield
    with layer.span(LayerPart.ATTENTION):
        layer.wait(ExchangeOperation.DISPATCH_BACKWARD)
        layer.compute(LayerPart.ATTENTION)
