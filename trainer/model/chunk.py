"""Layers of one pipeline stage, run as generators that yield after each communication they launch.

`run_to_completion` runs a generator alone. `interleave` runs two, a forward and a backward: one computes while the
exchange of the other is in flight. Interleaved, each yields once more per layer: the forward after it launches the
second part of its dispatch, the backward after it queues mlp(B), which hides that part.

Each layer's forward returns its output and its backward, a function that starts another generator. A backward computes
the gradients of inputs, launches the exchange that needs them, and then flushes delayed weight gradients.

Letters: B batch, S sequence, T tokens (B·S), W window (S inputs, the target of the last, and one more per MTP depth),
D hidden, V vocabulary, E experts, K top-k, R rows received by this rank, L experts on this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...comm.async_comm import AsyncWork
from ...comm.exchange.api import TokenExchange
from ...comm.trace import EXPOSED_ALL_TO_ALL, NULL_RECORDER, ExchangeLabel, SpanRecorder, TimelineTrack
from ...parallelism.pipeline.instruction import Resumable
from ...parallelism.weight_grad import DelayedWeightGradients
from .forward_context import ForwardContext, ForwardOutput, LossNormalizers, StageSpec
from .layer import DenseLayer, LayerContext, MoELayer
from .loss import IGNORE_INDEX, linear_cross_entropy
from .model import Model, MTPModule, layer_name, mtp_layer_name
from .recompute import RecomputeModule, SelectiveRecompute
from .rope import RotaryEmbedding, build_rotary_embedding
from .router import RouterOutput
from .split_backward import SplitBackward

T = TypeVar("T")
BackwardFunction = Callable[[Tensor, DelayedWeightGradients], Resumable[Tensor]]
"""Backward of a layer: from the gradient of its output to that of its input; adds delayed weight gradients to the
second argument."""


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
        self._exchange = exchange
        self._dtype = dtype
        self._recorder = recorder
        self._recompute = SelectiveRecompute(recompute)
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
        context = self._new_context(torch.ones_like(tokens_BS, dtype=torch.bool))
        hidden_BSD, _ = yield from self._main(tokens_BS, received_BSD, context)
        return hidden_BSD

    def compute_mtp_logits(self, hidden_BSD: Tensor, next_BS: Tensor) -> Resumable[Tensor]:
        """Compute logits [B, S, V] of the tokens after the next ones, by the first MTP module (report eq. 21-23).

        `hidden_BSD` is the result of `compute_hidden_states`, `next_BS` the token after each position. Use under
        `torch.no_grad`.
        """
        module = self.model.mtp[0]
        assert isinstance(module, MTPModule)
        context = self._new_context(torch.ones_like(next_BS, dtype=torch.bool))
        further_BSD, _ = yield from self._mtp_depth(mtp_layer_name(1), module, hidden_BSD, next_BS, context)
        return self.apply_output_head(further_BSD)

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
        length = tokens_BW.shape[1] - 1 - self.model.config.num_nextn_predict_layers
        context = self._new_context(valid_BW[:, :length], micro_batch, normalizers)
        hidden_BSD, main_backward = yield from self._main(tokens_BW[:, :length], received_BSD, context)
        losses: list[tuple[SplitBackward, Tensor]] = []
        depth_backwards: list[BackwardFunction] = []
        if self.stage.is_last:
            losses, depth_backwards = yield from self._losses(tokens_BW, valid_BW, hidden_BSD, context)

        def run_backward(grad_BSD: Tensor | None, weights: DelayedWeightGradients) -> Resumable[Tensor | None]:
            # All losses first, at no cost: the cross-entropy computed its input gradients in the forward. Then from the
            # deepest MTP module back to the main model, where each depth's hidden state also gets its loss's gradient.
            grads = [phase.backward_inputs(weights, torch.ones_like(loss))[0] for phase, loss in losses]
            if grads:
                grad_BSD = grads.pop()
            assert grad_BSD is not None
            while depth_backwards:
                grad_BSD = yield from depth_backwards.pop()(grad_BSD, weights)
                grad_BSD = grad_BSD + grads.pop()
            grad_BSD = yield from main_backward(grad_BSD, weights)
            # The attention weights of the lowest layer have no exchange left to hide behind.
            self._flush_weight_gradients(weights, "attn(W)")
            return None if self.stage.is_first else grad_BSD

        return ForwardOutput(
            output_BSD=None if self.stage.is_last else hidden_BSD,
            metrics=context.build_metrics([loss for _, loss in losses]),
            backward=run_backward,
        )

    def _new_context(
        self, valid_BS: Tensor, micro_batch: int = 0, normalizers: LossNormalizers | None = None
    ) -> ForwardContext:
        length = valid_BS.shape[1]
        # Cached: the angles are computed in FP64 on the host, and the length rarely changes between micro-batches.
        if self._rotation is None or len(self._rotation.freqs_cis_SP) != length:
            like = torch.empty(0, device=valid_BS.device, dtype=self._dtype)
            self._rotation = build_rotary_embedding(self.model.config, length, like)
        return ForwardContext(LayerContext(self._rotation, valid_BS), micro_batch, normalizers)

    def _losses(
        self, tokens_BW: Tensor, valid_BW: Tensor, hidden_BSD: Tensor, context: ForwardContext
    ) -> Resumable[tuple[list[tuple[SplitBackward, Tensor]], list[BackwardFunction]]]:
        """Compute the loss of every depth, the main model's first; return them with the backward of each MTP module."""
        length = context.layer_context.valid_BS.shape[1]

        def loss(k: int, hidden_BSD: Tensor, factor: float) -> tuple[SplitBackward, Tensor]:
            counted = context.layer_context.valid_BS & valid_BW[:, k + 1 : length + k + 1]
            targets_BS = tokens_BW[:, k + 1 : length + k + 1].masked_fill(~counted, IGNORE_INDEX)
            with self._span("loss(F)"):
                return self._run_phase(lambda h: self._cross_entropy(h, targets_BS, factor), hidden_BSD)

        normalizers, backwards = context.normalizers, list[BackwardFunction]()
        if normalizers is None:
            return [loss(0, hidden_BSD, factor=1.0)], backwards
        losses = [loss(0, hidden_BSD, normalizers.main_loss)]
        for k, module in enumerate(self.model.mtp, start=1):
            assert isinstance(module, MTPModule)
            hidden_BSD, backward = yield from self._mtp_depth(
                mtp_layer_name(k), module, hidden_BSD, tokens_BW[:, k : length + k], context
            )
            backwards.append(backward)
            losses.append(loss(k, hidden_BSD, normalizers.mtp_loss))
        return losses, backwards

    def _cross_entropy(self, hidden_BSD: Tensor, targets_BS: Tensor, factor: float) -> Tensor:
        assert self.model.head is not None
        return linear_cross_entropy(hidden_BSD.flatten(0, 1), self.model.head.weight, targets_BS.flatten(), factor)

    def _embed(self, tokens_BS: Tensor) -> Tensor:
        assert self.model.embedding is not None
        embedded_BSD: Tensor = self.model.embedding(tokens_BS)
        return embedded_BSD.to(self._dtype)

    def _main(
        self, tokens_BS: Tensor, received_BSD: Tensor | None, context: ForwardContext
    ) -> Resumable[tuple[Tensor, BackwardFunction]]:
        """Run the stage's layers of the main model, after the embedding on the first stage and with the final norm on
        the last; return h^0 [B, S, D] and the backward."""
        embed: SplitBackward | None = None
        final: SplitBackward | None = None
        if self.stage.is_first:
            embed, received_BSD = self._run_phase(lambda: self._embed(tokens_BS))
        assert received_BSD is not None
        output_BSD, backwards = yield from self._layers(received_BSD, context)
        if self.stage.is_last:
            assert self.model.final_norm is not None
            final, output_BSD = self._run_phase(self.model.final_norm, output_BSD)

        def run_backward(grad_BSD: Tensor, weights: DelayedWeightGradients) -> Resumable[Tensor]:
            if final is not None:
                (grad_BSD,) = final.backward_inputs(weights, grad_BSD)
            while backwards:
                grad_BSD = yield from backwards.pop()(grad_BSD, weights)
            if embed is not None:
                embed.backward_inputs(weights, grad_BSD)
            return grad_BSD

        return output_BSD, run_backward

    def _layers(self, hidden_BSD: Tensor, context: ForwardContext) -> Resumable[tuple[Tensor, list[BackwardFunction]]]:
        backwards: list[BackwardFunction] = []
        for index in self.stage.layers:
            layer = self.model.layers[str(index)]
            if isinstance(layer, MoELayer):
                hidden_BSD, backward = yield from self._moe(layer_name(index), layer, hidden_BSD, context)
            else:
                assert isinstance(layer, DenseLayer)
                hidden_BSD, backward = self._dense(layer, hidden_BSD, context.layer_context)
            if torch.is_grad_enabled():  # without a backward, dropping it frees the layer's activations
                backwards.append(backward)
        return hidden_BSD, backwards

    def _mtp_depth(
        self, name: str, module: MTPModule, hidden_BSD: Tensor, tokens_BS: Tensor, context: ForwardContext
    ) -> Resumable[tuple[Tensor, BackwardFunction]]:
        """Run one MTP depth: from h^{k-1} and the tokens k positions further to h^k, [B, S, D]."""
        merged, input_BSD = self._run_phase(lambda h: module.merge_inputs(h, self._embed(tokens_BS)), hidden_BSD)
        layer_BSD, layer_backward = yield from self._moe(name, module.layer, input_BSD, context)
        final, output_BSD = self._run_phase(module.final_norm, layer_BSD)

        def run_backward(grad_BSD: Tensor, weights: DelayedWeightGradients) -> Resumable[Tensor]:
            (grad_BSD,) = final.backward_inputs(weights, grad_BSD)
            grad_BSD = yield from layer_backward(grad_BSD, weights)
            (grad_BSD,) = merged.backward_inputs(weights, grad_BSD)
            return grad_BSD

        return output_BSD, run_backward

    def _moe(
        self, name: str, layer: MoELayer, hidden_BSD: Tensor, context: ForwardContext
    ) -> Resumable[tuple[Tensor, BackwardFunction]]:
        """Run the five phases of an MoE layer, and return the output and the backward, which runs them in reverse."""
        exchange = self._exchange
        routing: RouterOutput | None = None

        def attend(hidden_BSD: Tensor) -> tuple[Tensor, ...]:
            nonlocal routing
            residual_BSD, normed_TD, routing = layer.attend_and_route(hidden_BSD, context.layer_context)
            return residual_BSD, normed_TD, routing.gates_TK, routing.balance_loss

        label = ExchangeLabel(name, context.micro_batch)
        with self._span("attn(F)", label):
            attended = SplitBackward(attend, hidden_BSD, recompute=self._recompute)
        assert routing is not None
        residual_BSD, normed_TD, gates_TK, balance = attended.pop_outputs()
        context.balance_losses.append(balance)
        context.tokens_per_expert_E[name] = routing.tokens_per_expert_E

        # Experts that compute in FP8 take the dispatched FP8 numbers as they are: widening them and quantizing again
        # would cost two passes over R × D.
        in_fp8 = layer.experts.fp8 is not None
        dispatched = exchange.dispatch(normed_TD, gates_TK, routing.expert_ids_TK, label, keep_quantized=in_fp8)
        is_interleaved = yield
        # Interleaved, the other micro-batch has queued its mlp(B) by now. The host must wait for sizes before it can
        # launch the second part of the dispatch; waiting earlier would have delayed that mlp(B), which hides this part.
        if is_interleaved:
            dispatched.launch_second_part()
            yield
        shared: SplitBackward | None = None
        shared_TD: Tensor | None = None
        with self._span("mlp(F)", label):
            # The shared expert needs no exchange: queued first, it computes while the host waits for the sizes.
            if layer.shared is not None:
                shared, shared_TD = self._run_phase(layer.shared, normed_TD)
            received = self._wait(dispatched, label)
            counts_L, quantized_rows = received.rows_per_expert_L, received.quantized_rows
            routed, routed_RD = self._run_phase(
                lambda rows, weights: layer.experts(rows, weights, counts_L, quantized_rows),
                received.rows_RD,
                received.gate_weights_R,
            )
        context.token_counts += received.token_counts
        handle = received.without_rows()  # the rows' memory belongs to the experts' phase alone from here on

        combined = exchange.combine(routed_RD, handle)
        yield
        routed_TD = self._wait(combined, label)
        merged_BSD = layer.add_expert_outputs(residual_BSD, routed_TD, shared_TD)

        def run_backward(grad_BSD: Tensor, weights: DelayedWeightGradients) -> Resumable[Tensor]:
            grad_TD = grad_BSD.flatten(0, 1)
            combine_backward = exchange.combine_backward(grad_TD, handle)
            # Weight gradients run while an exchange is in flight: attn(W) of the layer above hides this one.
            self._flush_weight_gradients(weights, "attn(W)")
            is_interleaved = yield
            with self._span("mlp(B)", label):
                grad_normed_TD = None if shared is None else shared.backward_inputs(weights, grad_TD)[0]
                grad_RD, grad_weights_R = routed.backward_inputs(weights, self._wait(combine_backward, label))
            # Interleaved, the other micro-batch launches the second part of its dispatch first: dispatch_backward needs
            # the result of mlp(B), and launched now it would keep that part waiting behind it.
            if is_interleaved:
                yield

            dispatch_backward = exchange.dispatch_backward(grad_RD, grad_weights_R, handle)
            self._flush_weight_gradients(weights, "mlp(W)")
            yield
            with self._span("attn(B)", label):
                grad_routed_TD, grad_gates_TK = self._wait(dispatch_backward, label)
                grad_normed_TD = grad_routed_TD if grad_normed_TD is None else grad_normed_TD + grad_routed_TD
                assert context.normalizers is not None
                # The balance loss is a leaf of this phase, so its gradient starts here, as a second backward root.
                root = torch.full_like(balance, context.normalizers.balance_loss)
                (grad_BSD,) = attended.backward_inputs(weights, grad_BSD, grad_normed_TD, grad_gates_TK, root)
            return grad_BSD

        return merged_BSD, run_backward

    def _dense(self, layer: DenseLayer, hidden_BSD: Tensor, context: LayerContext) -> tuple[Tensor, BackwardFunction]:
        with self._span("dense(F)"):
            phase, output_BSD = self._run_phase(lambda h: layer(h, context), hidden_BSD)

        def run_backward(grad_BSD: Tensor, weights: DelayedWeightGradients) -> Resumable[Tensor]:
            yield from ()
            with self._span("dense(B)"):
                return phase.backward_inputs(weights, grad_BSD)[0]

        return output_BSD, run_backward

    def _run_phase(self, function: Callable[..., Tensor], *inputs: Tensor) -> tuple[SplitBackward, Tensor]:
        """Run `function` as a phase with one output; return the phase and the output."""
        phase = SplitBackward(lambda *inputs: (function(*inputs),), *inputs, recompute=self._recompute)
        return phase, phase.pop_outputs()[0]

    def _span(self, name: str, label: ExchangeLabel | None = None) -> AbstractContextManager[object]:
        return self._recorder.span(TimelineTrack.COMPUTE, name, label)

    def _wait(self, pending: AsyncWork[T], label: ExchangeLabel) -> T:
        with self._recorder.span(TimelineTrack.COMPUTE, EXPOSED_ALL_TO_ALL, label):
            return pending.wait()

    def _flush_weight_gradients(self, weights: DelayedWeightGradients, name: str) -> None:
        """Flush pending weight gradients now that no peer is waiting, unless they are deferred to a W instruction."""
        if weights.has_work_to_flush:
            with self._span(name):
                weights.flush_unless_deferred()
