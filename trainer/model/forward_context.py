"""Inputs and outputs of a chunk's forward for one micro-batch: context, normalizers, metrics and backward.

Letters: B batch, S sequence, D hidden, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...comm.exchange.permutation import ZERO_TOKEN_COUNTS, TokenCounts
from ...parallelism.pipeline.instruction import Resumable
from ...parallelism.weight_grad import DelayedWeightGradients
from .layer import LayerContext


@dataclass(frozen=True)
class LossNormalizers:
    """Factors from a micro-batch's loss sums to its part of the loss of the global batch."""

    main_loss: float
    """1 / valid targets of the global batch."""
    mtp_loss: float
    """λ / (D · valid targets of the global batch): eq. 24-25 divide by the length of the sequence at every depth."""
    balance_loss: float
    """α / sequences of the global batch."""


@dataclass(frozen=True)
class MicroBatchMetrics:
    """Losses and loads of one micro-batch's forward through a stage."""

    main_loss_sum: Tensor
    """Cross-entropy summed over the valid targets, in nats; 0 except on the last stage."""
    mtp_loss_sum: Tensor
    """Cross-entropy summed over valid targets and MTP depths, in nats; 0 without MTP or without a backward."""
    balance_loss_sum: Tensor
    """Balance loss without α, summed over the stage's routed layers and sequences."""
    tokens_per_expert_E: dict[str, Tensor]
    """int64 load of each router, by layer name."""
    token_counts: TokenCounts
    """Rows sent by the token exchange, summed over the stage's routed layers."""


StageBackward = Callable[[Tensor | None, DelayedWeightGradients], Resumable[Tensor | None]]
"""Backward of a stage: from the gradient of its output (None on the last stage) to that of its input (None on the
first). Delayed weight gradients are added to the second argument."""


@dataclass(frozen=True)
class ForwardOutput:
    """Result of one micro-batch's forward through a stage."""

    output_BSD: Tensor | None
    """Activation for the next stage; None from the last."""
    metrics: MicroBatchMetrics
    backward: StageBackward


@dataclass(frozen=True)
class StageSpec:
    """Part of the model that a chunk runs."""

    layers: range
    is_first: bool = True
    """True if the stage begins with the embedding."""
    is_last: bool = True
    """True if the stage ends with final norm, MTP modules and losses."""


@dataclass
class ForwardContext:
    """State of one micro-batch that its forward writes and its backward reads."""

    layer_context: LayerContext
    micro_batch: int
    normalizers: LossNormalizers | None
    """None if there is no backward. The balance loss is an extra backward root in every routed layer."""
    balance_losses: list[Tensor] = field(default_factory=list)
    tokens_per_expert_E: dict[str, Tensor] = field(default_factory=dict)
    token_counts: TokenCounts = ZERO_TOKEN_COUNTS

    def build_metrics(self, losses: list[Tensor]) -> MicroBatchMetrics:
        """Return the metrics; `losses` are those of the last stage, the main model's first, or empty."""
        like = self.layer_context.valid_BS.new_zeros((), dtype=torch.float32)
        return MicroBatchMetrics(
            main_loss_sum=losses[0] if losses else like,
            mtp_loss_sum=torch.stack(losses[1:]).sum() if losses[1:] else like,
            balance_loss_sum=torch.stack(self.balance_losses).sum() if self.balance_losses else like,
            tokens_per_expert_E=self.tokens_per_expert_E,
            token_counts=self.token_counts,
        )
