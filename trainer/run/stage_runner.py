"""A chunk at work on one global batch: what the executor of a program sees of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...parallelism.pipeline.executor import Resumable
from ...parallelism.weight_grad import DelayedWeightGradients
from ..data.samples import TokenBatch
from ..model.chunk import Chunk
from ..model.forward_context import LossNormalizers, MicroBatchMetrics, StageBackward


@dataclass(frozen=True)
class StageRunner:
    """One chunk with the micro-batches of a step. Without gradients (`torch.no_grad`) forwards keep nothing."""

    chunk: Chunk
    micro_batches: Sequence[TokenBatch]
    loss_normalizers: LossNormalizers | None = None
    """None where there is no backward."""
    metrics: list[MicroBatchMetrics] = field(default_factory=list)
    """Of the forwards that have run."""
    _backwards: dict[int, StageBackward] = field(default_factory=dict)
    """Of the micro-batches whose backward has not begun."""

    def forward(self, micro_batch: int, received: Tensor | None) -> Resumable[Tensor | None]:
        """See `parallelism.pipeline.executor.Stage`."""
        batch = self.micro_batches[micro_batch]
        forward = yield from self.chunk.forward(
            batch.tokens_BW, batch.valid_BW, self.loss_normalizers, micro_batch, received
        )
        self.metrics.append(forward.metrics)
        if torch.is_grad_enabled():
            self._backwards[micro_batch] = forward.backward
        return forward.output_BSD

    def backward(
        self, micro_batch: int, received: Tensor | None, weights: DelayedWeightGradients
    ) -> Resumable[Tensor | None]:
        """See `parallelism.pipeline.executor.Stage`."""
        return (yield from self._backwards.pop(micro_batch)(received, weights))

    def empty_activation(self, micro_batch: int) -> Tensor:
        """See `parallelism.pipeline.executor.Stage`."""
        batch = self.micro_batches[micro_batch]
        sequences, window = batch.tokens_BW.shape
        length = window - 1 - self.chunk.model.config.num_nextn_predict_layers
        return self.chunk.empty_activation(sequences, length, batch.tokens_BW.device)


@dataclass(frozen=True)
class LogitsStage:
    """One chunk that reads some text and says what comes next; the last one keeps its logits."""

    chunk: Chunk
    tokens_BS: Tensor
    logits: list[Tensor] = field(default_factory=list)
    """[B, S, V], when the last stage has run."""

    def forward(self, micro_batch: int, received: Tensor | None) -> Resumable[Tensor | None]:
        """See `parallelism.pipeline.executor.Stage`."""
        output = yield from self.chunk.compute_logits(self.tokens_BS, received)
        if not self.chunk.stage.is_last:
            return output
        self.logits.append(output)
        return None

    def backward(
        self, micro_batch: int, received: Tensor | None, weights: DelayedWeightGradients
    ) -> Resumable[Tensor | None]:
        """Reading has none."""
        raise NotImplementedError

    def empty_activation(self, micro_batch: int) -> Tensor:
        """See `parallelism.pipeline.executor.Stage`."""
        sequences, length = self.tokens_BS.shape
        return self.chunk.empty_activation(sequences, length, self.tokens_BS.device)
