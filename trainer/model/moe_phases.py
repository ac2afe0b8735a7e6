"""The five phases of an MoE layer on tensors, forward and backward: attend | dispatch | experts | combine | merge.

`parallelism/pipeline/chunk_walk.py` gives their order. Attributes hold the results of all phases until the layer is
done.

Letters: B batch, S sequence, T tokens (B·S), D hidden, K top-k, R rows received by this rank, L experts on this rank.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from ...comm.async_comm import AsyncWork
from ...comm.exchange.api import TokenExchange
from ...comm.trace import EXPOSED_ALL_TO_ALL, ExchangeLabel, SpanRecorder, TimelineTrack
from ...parallelism.pipeline.chunk_walk import ExchangeOperation, LayerPart, MoELayerInterpreter, phase_name
from ...parallelism.pipeline.program import Op
from ...parallelism.weight_grad import DelayedWeightGradients
from .forward_context import ForwardContext
from .layer import MoELayer
from .recompute import SelectiveRecompute
from .router import RouterOutput
from .split_backward import SplitBackward

T = TypeVar("T")


@dataclass(frozen=True)
class PhaseRunner:
    """Token exchange, recorder and recompute policy that a chunk's phases run with."""

    exchange: TokenExchange[Any]
    recorder: SpanRecorder
    recompute: SelectiveRecompute

    def run_phase(self, function: Callable[..., Tensor], *inputs: Tensor) -> tuple[SplitBackward, Tensor]:
        """Run `function` as a phase with one output; return the phase and the output."""
        phase = SplitBackward(lambda *inputs: (function(*inputs),), *inputs, recompute=self.recompute)
        return phase, phase.pop_outputs()[0]

    def span(self, name: str, label: ExchangeLabel | None = None) -> AbstractContextManager[object]:
        """Return the context of a span of the compute track."""
        return self.recorder.span(TimelineTrack.COMPUTE, name, label)

    def wait(self, pending: AsyncWork[T], label: ExchangeLabel) -> T:
        """Wait for an exchange, in a span of its own."""
        with self.span(EXPOSED_ALL_TO_ALL, label):
            return pending.wait()

    def flush_weight_gradients(self, weights: DelayedWeightGradients, part: LayerPart) -> None:
        """Flush pending weight gradients now that no peer is waiting, unless they are deferred to a W instruction."""
        if weights.has_work_to_flush:
            with self.span(phase_name(part, Op.W)):
                weights.flush_unless_deferred()


@dataclass(frozen=True)
class SavedMoELayer:
    """State of an MoE layer's forward that its backward needs."""

    label: ExchangeLabel
    attended: SplitBackward
    balance_loss: Tensor
    shared: SplitBackward | None
    routed: SplitBackward
    handle: Any
    """Layout of the exchange, without the rows."""


class MoEForward(MoELayerInterpreter):
    """Forward of an MoE layer: attend | dispatch | experts | combine | merge."""

    def __init__(
        self,
        runner: PhaseRunner,
        layer: MoELayer,
        name: str,
        hidden_BSD: Tensor,
        context: ForwardContext,
        finish: Callable[[Tensor, SavedMoELayer], None],
    ) -> None:
        """Begin the layer `name`; `finish` gets its output and what its backward needs."""
        self._runner, self._layer, self._context, self._finish = runner, layer, context, finish
        self._label = ExchangeLabel(name, context.micro_batch)
        self._hidden_BSD = hidden_BSD
        self._shared: SplitBackward | None = None
        self._shared_TD: Tensor | None = None

    @override
    def span(self, part: LayerPart) -> AbstractContextManager[object]:
        return self._runner.span(phase_name(part, Op.F), self._label)

    @override
    def compute(self, part: LayerPart) -> None:
        match part:
            case LayerPart.ATTENTION:
                self._attend()
            case LayerPart.SHARED_EXPERTS if self._layer.shared is not None:
                self._shared, self._shared_TD = self._runner.run_phase(self._layer.shared, self._normed_TD)
            case LayerPart.ROUTED_EXPERTS:
                self._run_experts()
            case LayerPart.MERGE:
                self._merge()

    @override
    def launch(self, exchange: ExchangeOperation) -> None:
        if exchange is ExchangeOperation.DISPATCH:
            # Experts that compute in FP8 take the dispatched FP8 numbers as they are: widening them and quantizing
            # again would cost two passes over R × D.
            self._dispatched = self._runner.exchange.dispatch(
                self._normed_TD,
                self._gates_TK,
                self._routing.expert_ids_TK,
                self._label,
                keep_quantized=self._layer.experts.fp8 is not None,
            )
        else:
            self._combined = self._runner.exchange.combine(self._routed_RD, self._handle)

    @override
    def launch_second_part(self) -> None:
        self._dispatched.launch_second_part()

    @override
    def wait(self, exchange: ExchangeOperation) -> None:
        if exchange is ExchangeOperation.DISPATCH:
            self._received = self._runner.wait(self._dispatched, self._label)
        else:
            self._routed_TD = self._runner.wait(self._combined, self._label)

    def _attend(self) -> None:
        """Run phase 1; the routing leaves it apart, since a phase returns floating point tensors only."""
        found: list[RouterOutput] = []

        def attend(hidden_BSD: Tensor) -> tuple[Tensor, ...]:
            residual_BSD, normed_TD, routing = self._layer.attend_and_route(hidden_BSD, self._context.layer_context)
            found.append(routing)
            return residual_BSD, normed_TD, routing.gates_TK, routing.balance_loss

        self._attended = SplitBackward(attend, self._hidden_BSD, recompute=self._runner.recompute)
        (self._routing,) = found
        self._residual_BSD, self._normed_TD, self._gates_TK, self._balance_loss = self._attended.pop_outputs()
        self._context.balance_losses.append(self._balance_loss)
        self._context.tokens_per_expert_E[self._label.layer] = self._routing.tokens_per_expert_E

    def _run_experts(self) -> None:
        """Run phase 3, the routed experts on the rows received."""
        received, experts = self._received, self._layer.experts
        counts_L, quantized_rows = received.rows_per_expert_L, received.quantized_rows
        self._routed, self._routed_RD = self._runner.run_phase(
            lambda rows, weights: experts(rows, weights, counts_L, quantized_rows),
            received.rows_RD,
            received.gate_weights_R,
        )
        self._context.token_counts += received.token_counts
        self._handle = received.without_rows()  # the rows' memory belongs to the experts' phase alone from here on

    def _merge(self) -> None:
        """Run phase 5."""
        merged_BSD = self._layer.add_expert_outputs(self._residual_BSD, self._routed_TD, self._shared_TD)
        self._finish(
            merged_BSD,
            SavedMoELayer(self._label, self._attended, self._balance_loss, self._shared, self._routed, self._handle),
        )


class MoEBackward(MoELayerInterpreter):
    """Backward of an MoE layer, its phases in reverse."""

    def __init__(
        self,
        runner: PhaseRunner,
        saved: SavedMoELayer,
        grad_BSD: Tensor,
        balance_loss_grad: float,
        weights: DelayedWeightGradients,
        finish: Callable[[Tensor], None],
    ) -> None:
        """Begin with the gradient of the layer's output; `finish` gets that of its input."""
        self._runner, self._saved, self._weights, self._finish = runner, saved, weights, finish
        self._balance_loss_grad = balance_loss_grad
        self._grad_BSD = grad_BSD
        self._grad_TD = grad_BSD.flatten(0, 1)
        self._grad_normed_TD: Tensor | None = None

    @override
    def span(self, part: LayerPart) -> AbstractContextManager[object]:
        return self._runner.span(phase_name(part, Op.B), self._saved.label)

    @override
    def compute(self, part: LayerPart) -> None:
        saved, weights = self._saved, self._weights
        match part:
            case LayerPart.SHARED_EXPERTS if saved.shared is not None:
                (self._grad_normed_TD,) = saved.shared.backward_inputs(weights, self._grad_TD)
            case LayerPart.ROUTED_EXPERTS:
                self._grad_RD, self._grad_weights_R = saved.routed.backward_inputs(weights, self._grad_routed_RD)
                del self._grad_routed_RD  # R × D, which nothing needs from here on
            case LayerPart.ATTENTION:
                self._attend()

    @override
    def launch(self, exchange: ExchangeOperation) -> None:
        if exchange is ExchangeOperation.COMBINE_BACKWARD:
            self._uncombined = self._runner.exchange.combine_backward(self._grad_TD, self._saved.handle)
        else:
            self._undispatched = self._runner.exchange.dispatch_backward(
                self._grad_RD, self._grad_weights_R, self._saved.handle
            )

    @override
    def wait(self, exchange: ExchangeOperation) -> None:
        if exchange is ExchangeOperation.COMBINE_BACKWARD:
            self._grad_routed_RD = self._runner.wait(self._uncombined, self._saved.label)
        else:
            self._grad_routed_TD, self._grad_gates_TK = self._runner.wait(self._undispatched, self._saved.label)

    @override
    def flush_weight_gradients(self, part: LayerPart) -> None:
        self._runner.flush_weight_gradients(self._weights, part)

    def _attend(self) -> None:
        """Run the backward of phase 1: of the residual stream, the experts' input, the gates and the balance loss."""
        grad_normed_TD = self._grad_routed_TD
        if self._grad_normed_TD is not None:
            grad_normed_TD = self._grad_normed_TD + self._grad_routed_TD
        # The balance loss is a leaf of this phase, so its gradient starts here, as a second backward root.
        root = torch.full_like(self._saved.balance_loss, self._balance_loss_grad)
        (grad_BSD,) = self._saved.attended.backward_inputs(
            self._weights, self._grad_BSD, grad_normed_TD, self._grad_gates_TK, root
        )
        self._finish(grad_BSD)
