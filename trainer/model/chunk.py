"""Layers of one pipeline stage on tensors: what each step of `parallelism/pipeline/chunk_walk.py` computes.

The walk gives the order, the classes here the meaning. A forward keeps each part's phase (`SplitBackward`), from which
the backward computes the gradients of the part's inputs; weight gradients are delayed until the walk flushes them.

Letters: B batch, S sequence, T tokens (B·S), W window (S inputs, the target of the last, and one more per MTP depth),
D hidden, V vocabulary, E experts, K top-k, R rows received by this rank, L experts on this rank.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from ...comm.exchange.api import TokenExchange
from ...comm.trace import NULL_RECORDER, SpanRecorder
from ...parallelism.pipeline.chunk_walk import (
    ChunkInterpreter,
    LayerPart,
    MoELayerInterpreter,
    StageShape,
    phase_name,
    walk_backward,
    walk_forward,
    walk_main_forward,
    walk_mtp_forward,
)
from ...parallelism.pipeline.instruction import Resumable
from ...parallelism.pipeline.program import Op
from ...parallelism.weight_grad import DelayedWeightGradients
from .forward_context import ForwardContext, ForwardOutput, LossNormalizers, StageSpec
from .layer import DenseLayer, LayerContext, MoELayer
from .loss import IGNORE_INDEX, linear_cross_entropy
from .model import Model, MTPModule, layer_name, mtp_layer_name
from .moe_phases import MoEBackward, MoEForward, PhaseRunner, SavedMoELayer
from .recompute import RecomputeModule, SelectiveRecompute
from .rope import RotaryEmbedding, build_rotary_embedding
from .split_backward import SplitBackward

T = TypeVar("T")


class Chunk:
    """Layers of one stage, with the token exchange, recorder and recompute policy that they run with.

    `dtype` is the dtype of activations.
    """

    def __init__(
        self,
        model: Model,
        exchange: TokenExchange[Any],
        dtype: torch.dtype,
        stage: StageSpec | None = None,
        recorder: SpanRecorder = NULL_RECORDER,
        recompute: frozenset[RecomputeModule] = frozenset(),
    ) -> None:
        self.model = model
        self.stage = stage or StageSpec(range(model.config.num_hidden_layers))
        self.runner = PhaseRunner(exchange, recorder, SelectiveRecompute(recompute))
        dense = sum(isinstance(self.layer(index), DenseLayer) for index in self.stage.layers)
        self._shape = StageShape(dense, len(self.stage.layers) - dense, self.stage.is_first, self.stage.is_last)
        self._dtype = dtype
        self._rotation: RotaryEmbedding | None = None
        """Rotary embedding of the last sequence length."""

    def empty_activation(self, sequences: int, length: int, device: torch.device) -> Tensor:
        """Return an empty tensor [B, S, D] of the shape and dtype that stages send each other."""
        return torch.empty((sequences, length, self.model.config.hidden_size), dtype=self._dtype, device=device)

    def compute_logits(self, tokens_BS: Tensor, received_BSD: Tensor | None = None) -> Resumable[Tensor]:
        """Compute the main model's logits [B, S, V]; before the last stage, the hidden state. Use under `no_grad`."""
        hidden_BSD = yield from self.compute_hidden_states(tokens_BS, received_BSD)
        return self.apply_output_head(hidden_BSD) if self.stage.is_last else hidden_BSD

    def compute_hidden_states(self, tokens_BS: Tensor, received_BSD: Tensor | None = None) -> Resumable[Tensor]:
        """Compute the stage's hidden state [B, S, D], after the final norm on the last. Use under `torch.no_grad`."""
        run = _Forward(self, Window(tokens_BS, torch.ones_like(tokens_BS, dtype=torch.bool)), received_BSD)
        yield from walk_main_forward(self._shape, run)
        return run.hidden_BSD

    def compute_mtp_logits(self, hidden_BSD: Tensor, next_BS: Tensor) -> Resumable[Tensor]:
        """Compute logits [B, S, V] of the tokens after the next ones, by the first MTP module (report eq. 21-23).

        `hidden_BSD` is the result of `compute_hidden_states`, `next_BS` the token after each position. Use under
        `torch.no_grad`.
        """
        window = Window(next_BS, torch.ones_like(next_BS, dtype=torch.bool), first=1)
        run = _Forward(self, window, hidden_BSD)
        yield from walk_mtp_forward(self._shape, 1, run)
        return self.apply_output_head(run.hidden_BSD)

    def apply_output_head(self, hidden_BSD: Tensor) -> Tensor:
        """Compute logits [..., V] from the hidden state [..., D]."""
        assert self.model.head is not None
        logits: Tensor = self.model.head(hidden_BSD)
        return logits

    def forward(
        self,
        tokens_BW: Tensor,
        valid_BW: Tensor,
        normalizers: LossNormalizers | None,
        micro_batch: int = 0,
        received_BSD: Tensor | None = None,
    ) -> Resumable[ForwardOutput]:
        """Run the forward of one micro-batch; the last stage ends with the losses of main model and MTP.

        `valid_BW` is False on padding. A target counts if it and the position that predicts it are valid; the experts'
        load counts every valid input. Without `normalizers` there is no backward, and no MTP, whose loss is only for
        training. `micro_batch` is its number, for error messages.
        """
        window = Window(tokens_BW, valid_BW, further=1 + self.model.config.num_nextn_predict_layers)
        run = _Forward(self, window, received_BSD, micro_batch, normalizers)
        mtp_modules = 0 if normalizers is None else len(self.model.mtp)
        yield from walk_forward(self._shape, mtp_modules, run)
        saved = run.saved  # not the forward itself, which holds its output

        def run_backward(grad_BSD: Tensor | None, weights: DelayedWeightGradients) -> Resumable[Tensor | None]:
            back = _Backward(self, saved, grad_BSD, weights)
            yield from walk_backward(self._shape, mtp_modules, back)
            return None if self.stage.is_first else back.grad_BSD

        return ForwardOutput(
            output_BSD=None if self.stage.is_last else run.hidden_BSD,
            metrics=saved.context.build_metrics(saved.losses),
            backward=run_backward,
        )

    def layer(self, index: int) -> nn.Module:
        """Return the layer with this number in the model."""
        return self.model.layers[str(index)]

    def mtp_module(self, depth: int) -> MTPModule:
        """Return the MTP module of a depth, which counts from 1."""
        module = self.model.mtp[depth - 1]
        assert isinstance(module, MTPModule)
        return module

    def moe_layer(self, place: int) -> tuple[str, MoELayer]:
        """Return an MoE layer and its name; `place` counts the stage's layers, then the MTP modules."""
        if (depth := place - self._shape.layers + 1) > 0:
            return mtp_layer_name(depth), self.mtp_module(depth).layer
        layer = self.layer(index := self.stage.layers[place])
        assert isinstance(layer, MoELayer)
        return layer_name(index), layer

    def embed(self, tokens_BS: Tensor) -> Tensor:
        """Return the tokens' embeddings [B, S, D] in the dtype of activations."""
        assert self.model.embedding is not None
        embedded_BSD: Tensor = self.model.embedding(tokens_BS)
        return embedded_BSD.to(self._dtype)

    def final_norm(self, depth: int) -> nn.Module:
        """Return the norm after the last layer, of the main model (depth 0) or of an MTP module."""
        norm = self.mtp_module(depth).final_norm if depth else self.model.final_norm
        assert norm is not None
        return norm

    def cross_entropy(self, hidden_BSD: Tensor, targets_BS: Tensor, factor: float) -> Tensor:
        """Return `factor` times the summed cross-entropy, whose gradient has that factor."""
        assert self.model.head is not None
        return linear_cross_entropy(hidden_BSD.flatten(0, 1), self.model.head.weight, targets_BS.flatten(), factor)

    def new_context(self, valid_BS: Tensor, micro_batch: int, normalizers: LossNormalizers | None) -> ForwardContext:
        """Return the context of a micro-batch."""
        length = valid_BS.shape[1]
        # Cached: the angles are computed in FP64 on the host, and the length rarely changes between micro-batches.
        if self._rotation is None or len(self._rotation.freqs_cis_SP) != length:
            like = torch.empty(0, device=valid_BS.device, dtype=self._dtype)
            self._rotation = build_rotary_embedding(self.model.config, length, like)
        return ForwardContext(LayerContext(self._rotation, valid_BS), micro_batch, normalizers)


@dataclass(frozen=True)
class Window:
    """Tokens of a micro-batch, from those `first` positions further than its inputs."""

    tokens_BW: Tensor
    valid_BW: Tensor
    further: int = 0
    """Positions after the S inputs."""
    first: int = 0

    def tokens(self, offset: int) -> Tensor:
        """Return the tokens [B, S] that are `offset` positions further than the inputs."""
        return self._shifted(self.tokens_BW, offset)

    def valid(self, offset: int) -> Tensor:
        """Return for each of these tokens whether it is none of the padding, [B, S]."""
        return self._shifted(self.valid_BW, offset)

    def _shifted(self, found_BW: Tensor, offset: int) -> Tensor:
        length = found_BW.shape[1] - self.further
        return found_BW[:, offset - self.first : offset - self.first + length]


@dataclass
class _SavedForward:
    """State of a chunk's forward that its backward needs."""

    context: ForwardContext
    phases: dict[tuple[LayerPart, int], SplitBackward] = field(default_factory=dict)
    layers: dict[int, SavedMoELayer] = field(default_factory=dict)
    losses: list[Tensor] = field(default_factory=list)
    """Loss of the main model, then of each MTP depth."""


class _Forward(ChunkInterpreter):
    """Forward of one micro-batch; `hidden_BSD` is the hidden state so far."""

    def __init__(
        self,
        chunk: Chunk,
        window: Window,
        received_BSD: Tensor | None,
        micro_batch: int = 0,
        normalizers: LossNormalizers | None = None,
    ) -> None:
        self.chunk = chunk
        self._window, self._normalizers = window, normalizers
        self.saved = _SavedForward(chunk.new_context(window.valid(window.first), micro_batch, normalizers))
        if received_BSD is not None:
            self.hidden_BSD = received_BSD

    @override
    def compute(self, part: LayerPart, index: int) -> None:
        match part:
            case LayerPart.EMBEDDING:
                self._run(part, index, lambda: self.chunk.embed(self._window.tokens(0)))
            case LayerPart.DENSE_LAYER:
                layer, context = self.chunk.layer(self.chunk.stage.layers[index]), self.saved.context.layer_context
                with self.chunk.runner.span(phase_name(part, Op.F)):
                    self._run(part, index, lambda h: layer(h, context), self.hidden_BSD)
            case LayerPart.MTP_MERGE:
                module, tokens_BS = self.chunk.mtp_module(index), self._window.tokens(index)
                embed = self.chunk.embed
                self._run(part, index, lambda h: module.merge_inputs(h, embed(tokens_BS)), self.hidden_BSD)
            case LayerPart.FINAL_NORM:
                self._run(part, index, self.chunk.final_norm(index), self.hidden_BSD)
            case LayerPart.LOSS:
                self._compute_loss(index)

    @override
    def moe_layer(self, place: int) -> MoELayerInterpreter:
        def finish(merged_BSD: Tensor, saved: SavedMoELayer) -> None:
            self.hidden_BSD = merged_BSD
            if torch.is_grad_enabled():
                self.saved.layers[place] = saved

        name, layer = self.chunk.moe_layer(place)
        return MoEForward(self.chunk.runner, layer, name, self.hidden_BSD, self.saved.context, finish)

    def _run(self, part: LayerPart, index: int, function: Callable[..., Tensor], *inputs: Tensor) -> None:
        phase, self.hidden_BSD = self.chunk.runner.run_phase(function, *inputs)
        if torch.is_grad_enabled():  # without a backward, dropping the phase frees its activations
            self.saved.phases[part, index] = phase

    def _compute_loss(self, depth: int) -> None:
        """Compute the loss of a depth, which leaves the hidden state as it is: the next depth begins with it."""
        counted_BS = self._window.valid(0) & self._window.valid(depth + 1)
        targets_BS = self._window.tokens(depth + 1).masked_fill(~counted_BS, IGNORE_INDEX)
        factor = 1.0
        if (normalizers := self._normalizers) is not None:
            factor = normalizers.mtp_loss if depth else normalizers.main_loss
        with self.chunk.runner.span(phase_name(LayerPart.LOSS, Op.F)):
            cross_entropy = self.chunk.cross_entropy
            phase, loss = self.chunk.runner.run_phase(lambda h: cross_entropy(h, targets_BS, factor), self.hidden_BSD)
        self.saved.losses.append(loss)
        if torch.is_grad_enabled():
            self.saved.phases[LayerPart.LOSS, depth] = phase


class _Backward(ChunkInterpreter):
    """Backward of one micro-batch; `grad_BSD` is the gradient of the hidden state so far."""

    def __init__(
        self, chunk: Chunk, saved: _SavedForward, grad_BSD: Tensor | None, weights: DelayedWeightGradients
    ) -> None:
        self.chunk, self.saved, self.weights = chunk, saved, weights
        if grad_BSD is not None:
            self.grad_BSD = grad_BSD
        self._loss_grads: list[Tensor] = []

    @override
    def compute(self, part: LayerPart, index: int) -> None:
        phase = self.saved.phases.pop((part, index))
        match part:
            case LayerPart.LOSS:
                self._loss_grads += phase.backward_inputs(self.weights, torch.ones_like(self.saved.losses[index]))
            case LayerPart.FINAL_NORM:
                if index == len(self.saved.losses) - 1:  # the deepest loss begins
                    self.grad_BSD = self._loss_grads.pop()
                self._run(phase)
            case LayerPart.MTP_MERGE:
                self._run(phase)
                self.grad_BSD = self.grad_BSD + self._loss_grads.pop()
            case LayerPart.DENSE_LAYER:
                with self.chunk.runner.span(phase_name(part, Op.B)):
                    self._run(phase)
            case LayerPart.EMBEDDING:
                phase.backward_inputs(self.weights, self.grad_BSD)

    @override
    def moe_layer(self, place: int) -> MoELayerInterpreter:
        def finish(grad_BSD: Tensor) -> None:
            self.grad_BSD = grad_BSD

        normalizers = self.saved.context.normalizers
        assert normalizers is not None
        layer = self.saved.layers.pop(place)
        return MoEBackward(self.chunk.runner, layer, self.grad_BSD, normalizers.balance_loss, self.weights, finish)

    @override
    def flush_weight_gradients(self, part: LayerPart) -> None:
        self.chunk.runner.flush_weight_gradients(self.weights, part)

    def _run(self, phase: SplitBackward) -> None:
        (self.grad_BSD,) = phase.backward_inputs(self.weights, self.grad_BSD)
