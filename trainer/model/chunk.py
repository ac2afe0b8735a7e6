"""Runs the layers of one pipeline stage as generators that yield each time they have launched a communication.

Alone, a generator is driven to its end with `drive`. Two of them can take turns: while one waits for its exchange, the
other computes. Then each yields once more a layer: the forward when it has launched the second part of its dispatch,
the backward when it has queued mlp(B), which hides that part.

Each layer's forward returns its output and its backward, a function that starts a generator of its own. A backward
computes gradients of inputs, launches the exchange that they wait for, and only then turns to those of weights.

Letters: B batch, S sequence, T tokens (B·S), W window (S inputs, the target of the last, and one more a depth of MTP),
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
from ...parallelism.pipeline.executor import Resumable
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
"""Gradient of a layer's output to gradient of its input; what is left to do for weights goes to the second."""


class Chunk:
    """The layers of one stage, ready to run. `dtype` is what they compute in."""

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
        """The one used last: its angles come from the host, and seldom for another length than before."""

    def empty_activation(self, sequences: int, length: int, device: torch.device) -> Tensor:
        """An empty tensor like what stages send each other for so many sequences of this length: [B, S, D]."""
        return torch.empty((sequences, length, self.model.config.hidden_size), dtype=self._dtype, device=device)

    def compute_logits(self, tokens_BS: Tensor, received_BSD: Tensor | None = None) -> Resumable[Tensor]:
        """Next-token logits [B, S, V] of the main model, or what the next stage needs. Use it under `torch.no_grad`."""
        hidden_BSD = yield from self.compute_hidden_states(tokens_BS, received_BSD)
        return self.apply_output_head(hidden_BSD) if self.stage.is_last else hidden_BSD

    def compute_hidden_states(self, tokens_BS: Tensor, received_BSD: Tensor | None = None) -> Resumable[Tensor]:
        """What the stage makes of text, [B, S, D]; the last one, after the final norm. Under `torch.no_grad`."""
        tape = self._tape(torch.ones_like(tokens_BS, dtype=torch.bool))
        hidden_BSD, _ = yield from self._main(tokens_BS, received_BSD, tape)
        return hidden_BSD

    def compute_mtp_logits(self, hidden_BSD: Tensor, next_BS: Tensor) -> Resumable[Tensor]:
        """Logits [B, S, V] of the tokens after the next ones, by the first MTP module (report eq. 21-23).

        `hidden_BSD` comes from `hidden` and `next_BS` are the tokens that follow each position. Under `torch.no_grad`.
        """
        module = self.model.mtp[0]
        assert isinstance(module, MTPModule)
        tape = self._tape(torch.ones_like(next_BS, dtype=torch.bool))
        further_BSD, _ = yield from self._depth(mtp_layer_name(1), module, hidden_BSD, next_BS, tape)
        return self.apply_output_head(further_BSD)

    def apply_output_head(self, hidden_BSD: Tensor) -> Tensor:
        """Logits [..., V]."""
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
        """Forward of one micro-batch; the last stage ends with the losses of the main model and of MTP.

        `valid_BW` is false on padding: a target counts where it and the position that predicts it are valid, the load
        counts every valid input. Without `scales` there is no backward, and no MTP, whose loss is for training alone.
        `micro_batch` is its number, for the words of errors.
        """
        length = tokens_BW.shape[1] - 1 - self.model.config.num_nextn_predict_layers
        tape = self._tape(valid_BW[:, :length], micro_batch, normalizers)
        hidden_BSD, main_backward = yield from self._main(tokens_BW[:, :length], received_BSD, tape)
        losses: list[tuple[SplitBackward, Tensor]] = []
        depth_backwards: list[BackwardFunction] = []
        if self.stage.is_last:
            losses, depth_backwards = yield from self._losses(tokens_BW, valid_BW, hidden_BSD, tape)

        def run_backward(grad_BSD: Tensor | None, weights: DelayedWeightGradients) -> Resumable[Tensor | None]:
            grads = [phase.backward_inputs(weights, torch.ones_like(loss))[0] for phase, loss in losses]
            if grads:
                grad_BSD = grads.pop()
            assert grad_BSD is not None
            while depth_backwards:
                grad_BSD = yield from depth_backwards.pop()(grad_BSD, weights)
                grad_BSD = grad_BSD + grads.pop()
            grad_BSD = yield from main_backward(grad_BSD, weights)
            self._settle(weights, "attn(W)")
            return None if self.stage.is_first else grad_BSD

        return ForwardOutput(
            output_BSD=None if self.stage.is_last else hidden_BSD,
            metrics=tape.build_metrics([loss for _, loss in losses]),
            backward=run_backward,
        )

    def _tape(self, valid_BS: Tensor, micro_batch: int = 0, scales: LossNormalizers | None = None) -> ForwardContext:
        length = valid_BS.shape[1]
        if self._rotation is None or len(self._rotation.freqs_cis_SP) != length:
            like = torch.empty(0, device=valid_BS.device, dtype=self._dtype)
            self._rotation = build_rotary_embedding(self.model.config, length, like)
        return ForwardContext(LayerContext(self._rotation, valid_BS), micro_batch, scales)

    def _losses(
        self, tokens_BW: Tensor, valid_BW: Tensor, hidden_BSD: Tensor, tape: ForwardContext
    ) -> Resumable[tuple[list[tuple[SplitBackward, Tensor]], list[BackwardFunction]]]:
        """The losses of every depth, the main model's first, with their phases, and the backward of each MTP module."""
        length = tape.layer_context.valid_BS.shape[1]

        def loss(k: int, hidden_BSD: Tensor, factor: float) -> tuple[SplitBackward, Tensor]:
            counted = tape.layer_context.valid_BS & valid_BW[:, k + 1 : length + k + 1]
            targets_BS = tokens_BW[:, k + 1 : length + k + 1].masked_fill(~counted, IGNORE_INDEX)
            with self._span("loss(F)"):
                return self._single(lambda h: self._cross_entropy(h, targets_BS, factor), hidden_BSD)

        scales, backwards = tape.normalizers, list[BackwardFunction]()
        if scales is None:
            return [loss(0, hidden_BSD, factor=1.0)], backwards
        losses = [loss(0, hidden_BSD, scales.main_loss)]
        for k, module in enumerate(self.model.mtp, start=1):
            assert isinstance(module, MTPModule)
            hidden_BSD, backward = yield from self._depth(
                mtp_layer_name(k), module, hidden_BSD, tokens_BW[:, k : length + k], tape
            )
            backwards.append(backward)
            losses.append(loss(k, hidden_BSD, scales.mtp_loss))
        return losses, backwards

    def _cross_entropy(self, hidden_BSD: Tensor, targets_BS: Tensor, factor: float) -> Tensor:
        assert self.model.head is not None
        return linear_cross_entropy(hidden_BSD.flatten(0, 1), self.model.head.weight, targets_BS.flatten(), factor)

    def _embed(self, tokens_BS: Tensor) -> Tensor:
        assert self.model.embedding is not None
        embedded_BSD: Tensor = self.model.embedding(tokens_BS)
        return embedded_BSD.to(self._dtype)

    def _main(
        self, tokens_BS: Tensor, received_BSD: Tensor | None, tape: ForwardContext
    ) -> Resumable[tuple[Tensor, BackwardFunction]]:
        """The stage's part of the main model: its layers, in the first after the embedding, in the last before the
        final norm: h^0, [B, S, D]."""
        embed: SplitBackward | None = None
        final: SplitBackward | None = None
        if self.stage.is_first:
            embed, received_BSD = self._single(lambda: self._embed(tokens_BS))
        assert received_BSD is not None
        output_BSD, backwards = yield from self._layers(received_BSD, tape)
        if self.stage.is_last:
            assert self.model.final_norm is not None
            final, output_BSD = self._single(self.model.final_norm, output_BSD)

        def run_backward(grad_BSD: Tensor, weights: DelayedWeightGradients) -> Resumable[Tensor]:
            if final is not None:
                (grad_BSD,) = final.backward_inputs(weights, grad_BSD)
            while backwards:
                grad_BSD = yield from backwards.pop()(grad_BSD, weights)
            if embed is not None:
                embed.backward_inputs(weights, grad_BSD)
            return grad_BSD

        return output_BSD, run_backward

    def _layers(self, hidden_BSD: Tensor, tape: ForwardContext) -> Resumable[tuple[Tensor, list[BackwardFunction]]]:
        backwards: list[BackwardFunction] = []
        for index in self.stage.layers:
            layer = self.model.layers[str(index)]
            if isinstance(layer, MoELayer):
                hidden_BSD, backward = yield from self._moe(layer_name(index), layer, hidden_BSD, tape)
            else:
                assert isinstance(layer, DenseLayer)
                hidden_BSD, backward = self._dense(layer, hidden_BSD, tape.layer_context)
            if torch.is_grad_enabled():  # else the layer's activations are free from here on
                backwards.append(backward)
        return hidden_BSD, backwards

    def _depth(
        self, name: str, module: MTPModule, hidden_BSD: Tensor, tokens_BS: Tensor, tape: ForwardContext
    ) -> Resumable[tuple[Tensor, BackwardFunction]]:
        """One depth of MTP: h^{k-1} and the tokens k further on to h^k, [B, S, D]."""
        merged, input_BSD = self._single(lambda h: module.merge_inputs(h, self._embed(tokens_BS)), hidden_BSD)
        layer_BSD, layer_backward = yield from self._moe(name, module.layer, input_BSD, tape)
        final, output_BSD = self._single(module.final_norm, layer_BSD)

        def run_backward(grad_BSD: Tensor, weights: DelayedWeightGradients) -> Resumable[Tensor]:
            (grad_BSD,) = final.backward_inputs(weights, grad_BSD)
            grad_BSD = yield from layer_backward(grad_BSD, weights)
            (grad_BSD,) = merged.backward_inputs(weights, grad_BSD)
            return grad_BSD

        return output_BSD, run_backward

    def _moe(
        self, name: str, layer: MoELayer, hidden_BSD: Tensor, tape: ForwardContext
    ) -> Resumable[tuple[Tensor, BackwardFunction]]:
        """The five phases, and their backward in the opposite order."""
        exchange = self._exchange
        routing: RouterOutput | None = None

        def attend(hidden_BSD: Tensor) -> tuple[Tensor, ...]:
            nonlocal routing
            residual_BSD, normed_TD, routing = layer.attend_and_route(hidden_BSD, tape.layer_context)
            return residual_BSD, normed_TD, routing.gates_TK, routing.balance_loss

        label = ExchangeLabel(name, tape.micro_batch)
        with self._span("attn(F)", label):
            attended = SplitBackward(attend, hidden_BSD, recompute=self._recompute)
        assert routing is not None
        residual_BSD, normed_TD, gates_TK, balance = attended.pop_outputs()
        tape.balance_losses.append(balance)
        tape.tokens_per_expert_E[name] = routing.tokens_per_expert_E

        in_fp8 = layer.experts.fp8 is not None
        dispatched = exchange.dispatch(normed_TD, gates_TK, routing.expert_ids_TK, label, keep_quantized=in_fp8)
        in_turns = yield
        if in_turns:  # mlp(B) of the other half has been queued, and hides the rest of the dispatch
            dispatched.launch_second_part()
            yield
        shared: SplitBackward | None = None
        shared_TD: Tensor | None = None
        with self._span("mlp(F)", label):  # alone, the shared expert is queued before the host waits for sizes
            if layer.shared is not None:
                shared, shared_TD = self._single(layer.shared, normed_TD)
            received = self._wait(dispatched, label)
            counts_L, came = received.rows_per_expert_L, received.quantized_rows
            routed, routed_RD = self._single(
                lambda rows, weights: layer.experts(rows, weights, counts_L, came),
                received.rows_RD,
                received.gate_weights_R,
            )
        tape.token_counts += received.token_counts
        way_back = received.without_rows()

        combined = exchange.combine(routed_RD, way_back)
        yield
        routed_TD = self._wait(combined, label)
        merged_BSD = layer.add_expert_outputs(residual_BSD, routed_TD, shared_TD)

        def run_backward(grad_BSD: Tensor, weights: DelayedWeightGradients) -> Resumable[Tensor]:
            grad_TD = grad_BSD.flatten(0, 1)
            uncombined = exchange.combine_backward(grad_TD, way_back)
            self._settle(weights, "attn(W)")  # of the layer above
            in_turns = yield
            with self._span("mlp(B)", label):
                grad_normed_TD = None if shared is None else shared.backward_inputs(weights, grad_TD)[0]
                grad_RD, grad_weights_R = routed.backward_inputs(weights, self._wait(uncombined, label))
            if in_turns:  # the rest of the other half's dispatch goes first: what follows waits for mlp(B)
                yield

            undispatched = exchange.dispatch_backward(grad_RD, grad_weights_R, way_back)
            self._settle(weights, "mlp(W)")
            yield
            with self._span("attn(B)", label):
                grad_routed_TD, grad_gates_TK = self._wait(undispatched, label)
                grad_normed_TD = grad_routed_TD if grad_normed_TD is None else grad_normed_TD + grad_routed_TD
                assert tape.normalizers is not None
                root = torch.full_like(balance, tape.normalizers.balance_loss)
                (grad_BSD,) = attended.backward_inputs(weights, grad_BSD, grad_normed_TD, grad_gates_TK, root)
            return grad_BSD

        return merged_BSD, run_backward

    def _dense(self, layer: DenseLayer, hidden_BSD: Tensor, context: LayerContext) -> tuple[Tensor, BackwardFunction]:
        with self._span("dense(F)"):
            phase, output_BSD = self._single(lambda h: layer(h, context), hidden_BSD)

        def run_backward(grad_BSD: Tensor, weights: DelayedWeightGradients) -> Resumable[Tensor]:
            yield from ()
            with self._span("dense(B)"):
                return phase.backward_inputs(weights, grad_BSD)[0]

        return output_BSD, run_backward

    def _single(self, function: Callable[..., Tensor], *inputs: Tensor) -> tuple[SplitBackward, Tensor]:
        """A phase that makes one tensor, and that tensor."""
        phase = SplitBackward(lambda *inputs: (function(*inputs),), *inputs, recompute=self._recompute)
        return phase, phase.pop_outputs()[0]

    def _span(self, name: str, label: ExchangeLabel | None = None) -> AbstractContextManager[object]:
        return self._recorder.span(TimelineTrack.COMPUTE, name, label)

    def _wait(self, pending: AsyncWork[T], label: ExchangeLabel) -> T:
        with self._recorder.span(TimelineTrack.COMPUTE, EXPOSED_ALL_TO_ALL, label):
            return pending.wait()

    def _settle(self, weights: DelayedWeightGradients, name: str) -> None:
        """What others wait for has been launched: now the weights."""
        if weights.has_work_to_flush:
            with self._span(name):
                weights.flush_unless_deferred()
