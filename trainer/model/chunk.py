"""Runs the layers forward and backward as generators that yield each time they have launched a communication.

Alone, a generator is driven to its end with `drive`. Two of them can take turns: while one waits for its exchange, the
other computes. Each layer's forward returns its output and its backward, a function that starts a generator of its own.

Letters: B batch, S sequence, T tokens (B·S), W window (S inputs, the target of the last, and one more a depth of MTP),
D hidden, V vocabulary, E experts, K top-k, R rows received by this rank, L experts on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...comm.exchange import TokenExchange
from ...comm.label import Label
from ...comm.layout import NO_VISITS, Visits
from .layer import Context, DenseLayer, MoELayer
from .loss import IGNORED, linear_cross_entropy
from .model import Model, MTPModule
from .phase import Phase
from .rope import rotation
from .router import Routing

Result = TypeVar("Result")
Steps = Generator[None, None, Result]
Backward = Callable[[Tensor], Steps[Tensor]]
"""Gradient of a layer's output to gradient of its input."""


def drive(steps: Steps[Result]) -> Result:
    """Run a generator to its end, waiting for each communication where it is needed."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            result: Result = stop.value
            return result


@dataclass(frozen=True)
class LossScales:
    """Factors that turn one micro-batch's sums into its part of the loss of the global batch."""

    main: float
    """1 / valid targets of the global batch."""
    mtp: float
    """λ / (D · valid targets of the global batch): eq. 24-25 divide by the length of the sequence at every depth."""
    balance: float
    """α / sequences of the global batch."""


@dataclass(frozen=True)
class Forward:
    """What one micro-batch's forward leaves behind."""

    main_sum: Tensor
    """Cross-entropy summed over the valid targets, in nats."""
    mtp_sum: Tensor
    """The same, summed over the further depths too; 0 without MTP."""
    balance_sum: Tensor
    """Balance loss without α, summed over routed layers and sequences."""
    counts_E: dict[str, Tensor]
    """int64 load of each router, by the layer's name."""
    visits: Visits
    """Of all routed layers together."""
    backward: Callable[[LossScales], Steps[None]]


@dataclass
class _Tape:
    """Filled by the forward of one micro-batch, consumed by its backward."""

    context: Context
    micro_batch: int
    balance_scale: float = 0.0
    """Known only when the backward starts: the balance loss is an extra backward root in every routed layer."""
    balance_sums: list[Tensor] = field(default_factory=list)
    counts_E: dict[str, Tensor] = field(default_factory=dict)
    visits: Visits = NO_VISITS


class Chunk:
    """The layers of one rank, ready to run. `dtype` is what they compute in."""

    def __init__(self, model: Model, exchange: TokenExchange[Any], dtype: torch.dtype) -> None:
        self.model = model
        self._exchange = exchange
        self._dtype = dtype

    def logits(self, tokens_BS: Tensor) -> Steps[Tensor]:
        """Next-token logits [B, S, V] of the main model. Nothing is kept: use it under `torch.no_grad`."""
        tape = self._tape(torch.ones_like(tokens_BS, dtype=torch.bool), micro_batch=0)
        hidden_BSD, _ = yield from self._main(tokens_BS, tape)
        logits: Tensor = self.model.head(hidden_BSD)
        return logits

    def losses(self, tokens_BW: Tensor, valid_BW: Tensor, micro_batch: int = 0) -> Steps[Forward]:
        """Forward of one micro-batch, main model and MTP. `valid_BW` is false on padding.

        `micro_batch` is its number, for the words of errors.

        A target counts where it and the position that predicts it are valid; the load counts every valid input.
        """
        model, depth = self.model, self.model.config.mtp_depth
        length = tokens_BW.shape[1] - 1 - depth
        tape = self._tape(valid_BW[:, :length], micro_batch)

        def targets(k: int) -> Tensor:
            counted = tape.context.valid_BS & valid_BW[:, k + 1 : length + k + 1]
            return tokens_BW[:, k + 1 : length + k + 1].masked_fill(~counted, IGNORED)

        hidden_BSD, main_backward = yield from self._main(tokens_BW[:, :length], tape)
        loss_phases = [Phase(lambda h: (self._cross_entropy(h, targets(0)),), hidden_BSD)]
        depth_backwards: list[Backward] = []
        for k, module in enumerate(model.mtp, start=1):
            assert isinstance(module, MTPModule)
            hidden_BSD, backward = yield from self._depth(
                f"mtp_{k:02d}", module, hidden_BSD, tokens_BW[:, k : length + k], tape
            )
            depth_backwards.append(backward)
            loss_phases.append(Phase(lambda h, k=k: (self._cross_entropy(h, targets(k)),), hidden_BSD))

        def run_backward(scales: LossScales) -> Steps[None]:
            tape.balance_scale = scales.balance
            factors = [scales.main] + [scales.mtp] * depth
            grads = [
                phase.backward(phase.outputs[0].new_tensor(s)) for phase, s in zip(loss_phases, factors, strict=True)
            ]
            grad_BSD = grads.pop()[0]
            while depth_backwards:
                grad_BSD = yield from depth_backwards.pop()(grad_BSD)
                grad_BSD = grad_BSD + grads.pop()[0]
            yield from main_backward(grad_BSD)

        sums = [phase.outputs[0] for phase in loss_phases]
        return Forward(
            main_sum=sums[0],
            mtp_sum=torch.stack(sums[1:]).sum() if depth else torch.zeros_like(sums[0]),
            balance_sum=torch.stack(tape.balance_sums).sum() if tape.balance_sums else torch.zeros_like(sums[0]),
            counts_E=tape.counts_E,
            visits=tape.visits,
            backward=run_backward,
        )

    def _tape(self, valid_BS: Tensor, micro_batch: int) -> _Tape:
        like = torch.empty(0, device=valid_BS.device, dtype=self._dtype)
        return _Tape(Context(rotation(self.model.config, valid_BS.shape[1], like), valid_BS), micro_batch)

    def _cross_entropy(self, hidden_BSD: Tensor, targets_BS: Tensor) -> Tensor:
        return linear_cross_entropy(hidden_BSD.flatten(0, 1), self.model.head.weight, targets_BS.flatten())

    def _main(self, tokens_BS: Tensor, tape: _Tape) -> Steps[tuple[Tensor, Backward]]:
        """Embedding, layers and final norm: h^0, [B, S, D]."""
        model = self.model
        embed = Phase(lambda: (model.embedding(tokens_BS).to(self._dtype),))
        (hidden_BSD,) = embed.outputs
        backwards: list[Backward] = []
        for index, layer in enumerate(model.layers):
            if isinstance(layer, MoELayer):
                hidden_BSD, backward = yield from self._moe(f"layer_{index:02d}", layer, hidden_BSD, tape)
            else:
                assert isinstance(layer, DenseLayer)
                hidden_BSD, backward = _dense(layer, hidden_BSD, tape.context)
            if torch.is_grad_enabled():  # else the layer's activations are free from here on
                backwards.append(backward)
        final = Phase(lambda h: (model.final_norm(h),), hidden_BSD)
        (normed_BSD,) = final.outputs

        def run_backward(grad_BSD: Tensor) -> Steps[Tensor]:
            (grad_BSD,) = final.backward(grad_BSD)
            while backwards:
                grad_BSD = yield from backwards.pop()(grad_BSD)
            embed.backward(grad_BSD)
            return grad_BSD

        return normed_BSD, run_backward

    def _depth(
        self, name: str, module: MTPModule, hidden_BSD: Tensor, tokens_BS: Tensor, tape: _Tape
    ) -> Steps[tuple[Tensor, Backward]]:
        """One depth of MTP: h^{k-1} and the tokens k further on to h^k, [B, S, D]."""

        def merge(h: Tensor) -> tuple[Tensor]:
            return (module.merge_inputs(h, self.model.embedding(tokens_BS).to(self._dtype)),)

        merged = Phase(merge, hidden_BSD)
        layer_BSD, layer_backward = yield from self._moe(name, module.layer, merged.outputs[0], tape)
        final = Phase(lambda h: (module.final_norm(h),), layer_BSD)

        def run_backward(grad_BSD: Tensor) -> Steps[Tensor]:
            (grad_BSD,) = final.backward(grad_BSD)
            grad_BSD = yield from layer_backward(grad_BSD)
            (grad_BSD,) = merged.backward(grad_BSD)
            return grad_BSD

        return final.outputs[0], run_backward

    def _moe(self, name: str, layer: MoELayer, hidden_BSD: Tensor, tape: _Tape) -> Steps[tuple[Tensor, Backward]]:
        """The five phases, and their backward in the opposite order."""
        exchange = self._exchange
        routing: Routing | None = None

        def attend(hidden_BSD: Tensor) -> tuple[Tensor, ...]:
            nonlocal routing
            residual_BSD, normed_TD, routing = layer.attend(hidden_BSD, tape.context)
            return residual_BSD, normed_TD, routing.gates_TK, routing.balance_loss

        attended = Phase(attend, hidden_BSD)
        assert routing is not None
        residual_BSD, normed_TD, gates_TK, balance = attended.outputs
        tape.balance_sums.append(balance)
        tape.counts_E[name] = routing.counts_E

        dispatched = exchange.dispatch(normed_TD, gates_TK, routing.experts_TK, Label(name, tape.micro_batch))
        yield
        shared_layer = layer.shared
        shared = None if shared_layer is None else Phase(lambda x: (shared_layer(x),), normed_TD)
        received = dispatched.wait()
        tape.visits += received.visits
        routed = Phase(
            lambda rows, weights: (layer.experts(rows, weights, received.rows_per_expert_L),),
            received.rows_RD,
            received.weights_R,
        )

        combined = exchange.combine(routed.outputs[0], received)
        yield
        merged_BSD = layer.merge(residual_BSD, combined.wait(), None if shared is None else shared.outputs[0])

        def run_backward(grad_BSD: Tensor) -> Steps[Tensor]:
            grad_TD = grad_BSD.flatten(0, 1)
            uncombined = exchange.combine_backward(grad_TD, received)
            yield
            grad_normed_TD = None if shared is None else shared.backward(grad_TD)[0]
            grad_RD, grad_weights_R = routed.backward(uncombined.wait())

            undispatched = exchange.dispatch_backward(grad_RD, grad_weights_R, received)
            yield
            grad_routed_TD, grad_gates_TK = undispatched.wait()
            grad_normed_TD = grad_routed_TD if grad_normed_TD is None else grad_normed_TD + grad_routed_TD
            root = balance.new_tensor(tape.balance_scale)
            (grad_BSD,) = attended.backward(grad_BSD, grad_normed_TD, grad_gates_TK, root)
            return grad_BSD

        return merged_BSD, run_backward


def _dense(layer: DenseLayer, hidden_BSD: Tensor, context: Context) -> tuple[Tensor, Backward]:
    phase = Phase(lambda h: (layer(h, context),), hidden_BSD)

    def run_backward(grad_BSD: Tensor) -> Steps[Tensor]:
        yield from ()
        return phase.backward(grad_BSD)[0]

    return phase.outputs[0], run_backward
