"""One optimizer step over a global batch: the same numbers however the batch is spread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..comm.groups import ProcessGroups
from ..comm.layout import NO_VISITS, Visits
from ..parallelism.gradients import Gradients
from .data.batch import TokenBatch
from .model.chunk import Chunk, Forward, LossScales, drive
from .model.router import update_bias
from .optimizer.adamw import set_learning_rate


class NonFiniteStep(RuntimeError):  # noqa: N818 -- says what happened
    """A loss or a gradient that is not a number. Raised on every rank, before any weight has changed."""


@dataclass(frozen=True)
class StepSettings:
    """What one step depends on besides weights and samples."""

    learning_rate: float
    clip_norm: float
    balance_weight: float
    mtp_weight: float
    bias_speed: float


@dataclass(frozen=True)
class StepResult:
    """Of the whole global batch, equal on every rank."""

    loss: float
    """Mean cross-entropy of the next token, in nats, over all valid targets."""
    mtp_loss: float
    """The same over all further depths; 0 without MTP."""
    balance_loss: float
    """α times the mean over sequences of the balance loss, summed over routed layers."""
    total_loss: float
    """What the gradients are of."""
    grad_norm: float
    """Before clipping."""
    valid_tokens: int
    counts_E: dict[str, Tensor]
    """int64 load of each router's experts."""
    visits: Visits
    """Of all routed layers together, padding included."""


@dataclass(frozen=True)
class Stepper:
    """Holds what every step needs on one rank."""

    chunk: Chunk
    optimizer: torch.optim.Optimizer
    gradients: Gradients
    groups: ProcessGroups

    def step(self, micro_batches: Sequence[TokenBatch], sequences: int, settings: StepSettings) -> StepResult:
        """Forward, backward, reduce, clip, update weights and routing biases.

        `micro_batches` are this rank's share of a global batch of `sequences`. Raises `NonFiniteStep`.
        """
        targets = self._count_targets(micro_batches)
        depth = self.chunk.model.config.mtp_depth
        scales = LossScales(
            main=1 / targets,
            mtp=settings.mtp_weight / (max(depth, 1) * targets),
            balance=settings.balance_weight / sequences,
        )
        forwards = [self._accumulate(batch, index, scales) for index, batch in enumerate(micro_batches)]
        main, mtp, balance = self._reduce_sums(forwards)
        counts_E = self._reduce_counts(forwards)
        self.gradients.reduce()
        norm = self.gradients.norm()
        total = main * scales.main + mtp * scales.mtp + balance * scales.balance
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise NonFiniteStep(f"loss {total}, gradient norm {norm}: not finite, so no weight was changed")
        self._update(norm, counts_E, settings)
        return StepResult(
            loss=main / targets,
            mtp_loss=mtp / (max(depth, 1) * targets),
            balance_loss=balance * scales.balance,
            total_loss=total,
            grad_norm=norm,
            valid_tokens=targets,
            counts_E=counts_E,
            visits=self._reduce_visits(forwards),
        )

    def _count_targets(self, micro_batches: Sequence[TokenBatch]) -> int:
        """Valid next-token targets of the global batch, known before the first backward: each loss is scaled once."""
        depth = self.chunk.model.config.mtp_depth
        count = torch.zeros((), dtype=torch.int64)
        for batch in micro_batches:
            count += count_targets(batch, depth).cpu()
        return max(1, int(self.groups.dense_dp.all_reduce_sum(count, "count of valid targets").item()))

    def _accumulate(self, batch: TokenBatch, index: int, scales: LossScales) -> Forward:
        forward = drive(self.chunk.losses(batch.tokens_BW, batch.valid_BW, index))
        drive(forward.backward(scales))
        return forward

    def _reduce_sums(self, forwards: Sequence[Forward]) -> tuple[float, float, float]:
        per_batch = [torch.stack((f.main_sum, f.mtp_sum, f.balance_sum)).double() for f in forwards]
        sums = self.groups.dense_dp.all_reduce_sum(torch.stack(per_batch).sum(dim=0).cpu(), "sum of losses")
        main, mtp, balance = sums.tolist()
        return main, mtp, balance

    def _reduce_counts(self, forwards: Sequence[Forward]) -> dict[str, Tensor]:
        """Load of the whole global batch: every rank's tokens, each counted where it was routed from."""
        names = list(forwards[0].counts_E)
        if not names:
            return {}
        counts_NE = torch.stack([sum_counts([f.counts_E[name] for f in forwards]) for name in names])
        self.groups.dense_dp.all_reduce_sum(counts_NE, "sum of expert loads")
        return dict(zip(names, counts_NE.unbind(), strict=True))

    def _reduce_visits(self, forwards: Sequence[Forward]) -> Visits:
        own = sum((forward.visits for forward in forwards), NO_VISITS)
        counts = torch.tensor(own.counts(), dtype=torch.int64)
        return Visits(*self.groups.dense_dp.all_reduce_sum(counts, "sum of routing statistics").tolist())

    def _update(self, norm: float, counts_E: dict[str, Tensor], settings: StepSettings) -> None:
        if norm > settings.clip_norm:
            self.gradients.scale(settings.clip_norm / norm)
        set_learning_rate(self.optimizer, settings.learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for name, router in self.chunk.model.routers():
            update_bias(router.bias_E, counts_E[name], settings.bias_speed)


def count_targets(batch: TokenBatch, mtp_depth: int) -> Tensor:
    """Next-token targets that count in a loss: valid, and predicted from a valid position. int64, 0-dimensional."""
    length = batch.valid_BW.shape[1] - 1 - mtp_depth
    return (batch.valid_BW[:, :length] & batch.valid_BW[:, 1 : length + 1]).sum()


def sum_counts(counts: Sequence[Tensor]) -> Tensor:
    """Exact sum of int64 loads."""
    return torch.stack(list(counts)).sum(dim=0)
