"""What a chunk is given for one micro-batch, what its forward leaves behind, and what it has to tell.

Letters: B batch, S sequence, D hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...comm.exchange.permutation import ZERO_TOKEN_COUNTS, TokenCounts
from ...parallelism.pipeline.executor import Resumable
from ...parallelism.weight_grad import DelayedWeightGradients
from .layer import LayerContext


@dataclass(frozen=True)
class LossNormalizers:
    """Factors that turn one micro-batch's sums into its part of the loss of the global batch."""

    main_loss: float
    """1 / valid targets of the global batch."""
    mtp_loss: float
    """λ / (D · valid targets of the global batch): eq. 24-25 divide by the length of the sequence at every depth."""
    balance_loss: float
    """α / sequences of the global batch."""


@dataclass(frozen=True)
class MicroBatchMetrics:
    """What one micro-batch's forward through a stage has to tell."""

    main_loss_sum: Tensor
    """Cross-entropy summed over the valid targets, in nats; 0 but for the last stage."""
    mtp_loss_sum: Tensor
    """The same, summed over the further depths too; 0 without MTP, and where there is no backward."""
    balance_loss_sum: Tensor
    """Balance loss without α, summed over the stage's routed layers and sequences."""
    tokens_per_expert_E: dict[str, Tensor]
    """int64 load of each router, by the layer's name."""
    token_counts: TokenCounts
    """Of the stage's routed layers together."""


StageBackward = Callable[[Tensor | None, DelayedWeightGradients], Resumable[Tensor | None]]
"""Given the gradient of a stage's output (None for the last stage), returns that of what was received (None for the
first); what is left to do for weights goes to the second."""


@dataclass(frozen=True)
class ForwardOutput:
    """What one micro-batch's forward leaves behind."""

    output_BSD: Tensor | None
    """For the next stage; None from the last."""
    metrics: MicroBatchMetrics
    backward: StageBackward


@dataclass(frozen=True)
class StageSpec:
    """Which part of the model a chunk runs."""

    layers: range
    is_first: bool = True
    """Begins with the embedding."""
    is_last: bool = True
    """Ends with the final norm, MTP modules and losses."""


@dataclass
class ForwardContext:
    """Filled by the forward of one micro-batch, consumed by its backward."""

    layer_context: LayerContext
    micro_batch: int
    normalizers: LossNormalizers | None
    """None where there is no backward. The balance loss is an extra backward root in every routed layer."""
    balance_losses: list[Tensor] = field(default_factory=list)
    tokens_per_expert_E: dict[str, Tensor] = field(default_factory=dict)
    token_counts: TokenCounts = ZERO_TOKEN_COUNTS

    def build_metrics(self, losses: list[Tensor]) -> MicroBatchMetrics:
        """With the losses of the last stage, of the main model first."""
        like = self.layer_context.valid_BS.new_zeros((), dtype=torch.float32)
        return MicroBatchMetrics(
            main_loss_sum=losses[0] if losses else like,
            mtp_loss_sum=torch.stack(losses[1:]).sum() if losses[1:] else like,
            balance_loss_sum=torch.stack(self.balance_losses).sum() if self.balance_losses else like,
            tokens_per_expert_E=self.tokens_per_expert_E,
            token_counts=self.token_counts,
        )
