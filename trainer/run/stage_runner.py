"""Adapters from a model chunk to the `PipelineStage` protocol of the pipeline executor."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...parallelism.pipeline.instruction import Resumable
from ...parallelism.weight_grad import DelayedWeightGradients
from ..data.samples import TokenBatch
from ..model.chunk import Chunk
from ..model.forward_context import LossNormalizers, MicroBatchMetrics, StageBackward


@dataclass(frozen=True)
class StageRunner:
    """Chunk with the micro-batches of one step. Under `torch.no_grad` forwards save nothing for a backward."""

    chunk: Chunk
    micro_batches: Sequence[TokenBatch]
    loss_normalizers: LossNormalizers | None = None
    """None if no backward will run."""
    metrics: list[MicroBatchMetrics] = field(default_factory=list)
    """Metrics of the forwards that have run."""
    _backwards: dict[int, StageBackward] = field(default_factory=dict)
    """Backwards that have not begun, by micro-batch."""

    def forward(self, micro_batch: int, received: Tensor | None) -> Resumable[Tensor | None]:
        """See `parallelism.pipeline.executor.PipelineStage`."""
        batch = self.micro_batches[micro_batch]
        forward = yield from self.chunk.forward(
            batch.tokens_BW, batch.valid_BW, self.loss_normalizers, micro_batch, received
        )
        self.metrics.append(forward.metrics)
        # An evaluation must not keep activations: it runs up to 4 micro-batches per rank in one program.
        if torch.is_grad_enabled():
            self._backwards[micro_batch] = forward.backward
        return forward.output_BSD

    def backward(
        self, micro_batch: int, received: Tensor | None, weights: DelayedWeightGradients
    ) -> Resumable[Tensor | None]:
        """See `parallelism.pipeline.executor.PipelineStage`."""
        # pop: the closure owns the saved activations, which are free once the backward has run.
        return (yield from self._backwards.pop(micro_batch)(received, weights))

    def empty_activation(self, micro_batch: int) -> Tensor:
        """See `parallelism.pipeline.executor.PipelineStage`."""
        batch = self.micro_batches[micro_batch]
        sequences, window = batch.tokens_BW.shape
        # A window holds S inputs, the target of the last one, and one more token per MTP depth.
        length = window - 1 - self.chunk.model.config.num_nextn_predict_layers
        return self.chunk.empty_activation(sequences, length, batch.tokens_BW.device)


@dataclass(frozen=True)
class LogitsStage:
    """Chunk that computes logits of some text, forward only; the last stage keeps them."""

    chunk: Chunk
    tokens_BS: Tensor
    logits: list[Tensor] = field(default_factory=list)
    """Logits [B, S, V], one entry after the last stage has run."""

    def forward(self, micro_batch: int, received: Tensor | None) -> Resumable[Tensor | None]:
        """See `parallelism.pipeline.executor.PipelineStage`."""
        output = yield from self.chunk.compute_logits(self.tokens_BS, received)
        if not self.chunk.stage.is_last:
            return output
        self.logits.append(output)
        return None

    def backward(
        self, micro_batch: int, received: Tensor | None, weights: DelayedWeightGradients
    ) -> Resumable[Tensor | None]:
        """Raise `NotImplementedError`: this stage runs forwards only."""
        raise NotImplementedError

    def empty_activation(self, micro_batch: int) -> Tensor:
        """See `parallelism.pipeline.executor.PipelineStage`."""
        sequences, length = self.tokens_BS.shape
        return self.chunk.empty_activation(sequences, length, self.tokens_BS.device)
