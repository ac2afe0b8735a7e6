"""One optimizer step over a global batch: the same numbers however the batch and the model are spread."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...comm.exchange.permutation import ZERO_TOKEN_COUNTS, TokenCounts
from ...comm.groups import ProcessGroups
from ...comm.host_transfer import to_device, to_host
from ...comm.trace import GRADIENT_SYNC_WAIT, NULL_RECORDER, OPTIMIZER, SpanRecorder, TimelineTrack
from ...comm.warm_up import warm_up_all_reduce
from ...parallelism.pipeline.executor import PipelineExecutor
from ...parallelism.zero.optimizer import ShardedOptimizer
from ..data.samples import TokenBatch
from ..model.chunk import Chunk
from ..model.config import ModelConfig
from ..model.forward_context import LossNormalizers, MicroBatchMetrics
from ..model.model import Model, router_names
from ..model.router import update_router_bias
from ..optimizer.ema import WeightEMA
from .schedule_cache import ScheduleCache
from .stage_runner import StageRunner
from .step_reduction import RankStepTotals, StepTotals, all_reduce_step_totals, reduction_length

HOST_READS_PER_STEP = 2
"""How often the host waits for the device in one step: for the targets of the global batch before the first forward,
and for everything that ranks sum at its end (`totals.py`). Beside these a rank waits once for each dispatch (see
`TokenExchange`), and never inside an FB for anything else."""

_VOTES = 4
"""Of the training loop."""
VoteSource = Callable[[], Sequence[bool]]
"""What this rank has to say to the others, asked once a step, shortly before its end."""


class NonFiniteStep(RuntimeError):  # noqa: N818 -- says what happened
    """A loss or a gradient that is not a number. Raised on every rank, before any weight has changed."""


@dataclass(frozen=True)
class StepSettings:
    """What one step depends on besides weights and samples."""

    learning_rate: float
    clip_norm: float
    seq_aux_loss_coeff: float
    mtp_loss_scaling_factor: float
    router_bias_update_rate: float


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
    tokens_per_expert_E: dict[str, Tensor]
    """int64 load of each router's experts."""
    token_counts: TokenCounts
    """Of all routed layers together, padding included."""
    router_bias_range: tuple[float, float]
    """Smallest and largest routing bias after the step; zeros without routers."""
    vote_counts: tuple[int, ...]
    """On how many ranks each vote was true."""


@dataclass(frozen=True)
class Stepper:
    """Holds what every step needs on one rank."""

    model: Model
    chunks: tuple[Chunk, ...]
    schedule_cache: ScheduleCache
    optimizer: ShardedOptimizer
    ema: WeightEMA | None
    groups: ProcessGroups
    recorder: SpanRecorder = NULL_RECORDER

    @property
    def config(self) -> ModelConfig:
        """Of the whole model."""
        return self.model.config

    @property
    def executor(self) -> PipelineExecutor:
        """What ran the last step, or will run the first."""
        return self.schedule_cache.current_executor

    def warm_up_communication(self, device: torch.device) -> None:
        """Connect what a step communicates over but for the token exchange: collective, in one order on all ranks.

        See `comm.warm_up` for why.
        """
        self.executor.connect_neighbors(device)
        self.optimizer.warm_up_collectives()
        few = torch.zeros(1, dtype=torch.float64, device=device)
        routers = len(router_names(self.config))
        for like in (few, few.expand(reduction_length(routers, self.config.n_routed_experts, _VOTES))):
            warm_up_all_reduce(self.groups.world, like)

    def step(
        self, micro_batches: Sequence[TokenBatch], sequences: int, settings: StepSettings, votes: VoteSource = tuple
    ) -> StepResult:
        """Forward, backward, reduce, clip, update weights and routing biases.

        `micro_batches` are this rank's share of a global batch of `sequences`. The new weights may still be on their
        way afterwards: see `optimizer.wait`. Raises `NonFiniteStep`.
        """
        with self.recorder.span(TimelineTrack.INSTRUCTION, GRADIENT_SYNC_WAIT):
            targets = self._count_targets(micro_batches)
        depth = self.config.num_nextn_predict_layers
        scales = LossNormalizers(
            main_loss=1 / targets,
            mtp_loss=settings.mtp_loss_scaling_factor / (max(depth, 1) * targets),
            balance_loss=settings.seq_aux_loss_coeff / sequences,
        )
        self.optimizer.reducer.begin_step()
        summaries = list(self._forward_backward(micro_batches, scales))
        with self.recorder.span(TimelineTrack.INSTRUCTION, GRADIENT_SYNC_WAIT):
            self.optimizer.reducer.finish_reduction()
            totals = self._sum_over_ranks(summaries, votes())
        main, mtp, balance = totals.loss_sums
        norm = math.sqrt(totals.grad_square_sum)
        total = main * scales.main_loss + mtp * scales.mtp_loss + balance * scales.balance_loss
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise NonFiniteStep(f"loss {total}, gradient norm {norm}: not finite, so no weight was changed")
        with self.recorder.span(TimelineTrack.INSTRUCTION, OPTIMIZER):
            self._update(norm, totals.tokens_per_expert_E, settings)
        return StepResult(
            loss=main / targets,
            mtp_loss=mtp / (max(depth, 1) * targets),
            balance_loss=balance * scales.balance_loss,
            total_loss=total,
            grad_norm=norm,
            valid_tokens=targets,
            tokens_per_expert_E=totals.tokens_per_expert_E,
            token_counts=totals.token_counts,
            router_bias_range=_bias_range(totals, settings.router_bias_update_rate),
            vote_counts=totals.vote_counts,
        )

    def _count_targets(self, micro_batches: Sequence[TokenBatch]) -> int:
        """Valid next-token targets of the global batch, known before the first backward: each loss is scaled once."""
        counts = [count_targets(batch, self.config.num_nextn_predict_layers) for batch in micro_batches]
        count = to_host(self.groups.world.all_reduce_sum(sum_counts(counts), "count of valid targets"))
        # The ranks of a pipeline read the same samples.
        return max(1, int(count.item()) // self.groups.topology.pp)

    def _forward_backward(
        self, micro_batches: Sequence[TokenBatch], scales: LossNormalizers
    ) -> Iterator[MicroBatchMetrics]:
        """Run the schedule; a summary of each micro-batch in each stage of this rank."""
        stages = [StageRunner(chunk, micro_batches, scales) for chunk in self.chunks]
        executor = self.schedule_cache.executor_for(len(micro_batches))
        with self.model.cache_fp8_weights():
            executor.run(stages, self.optimizer)
        for stage in stages:
            yield from stage.metrics

    def _sum_over_ranks(self, summaries: Sequence[MicroBatchMetrics], votes: Sequence[bool]) -> StepTotals:
        """Each stage adds what it has: the last one the losses, all of them their layers' balance and loads."""
        per_batch = [
            torch.stack((s.main_loss_sum.double(), s.mtp_loss_sum.double(), s.balance_loss_sum.double()))
            for s in summaries
        ]
        # Routers of one pipeline rank are equal on all its ranks.
        speaks = self.groups.topology.dp_rank(self.groups.rank) == 0
        share = RankStepTotals(
            loss_sums=torch.stack(per_batch).sum(dim=0),
            grad_square_sum=self.optimizer.reducer.sum_of_squares(),
            tokens_per_expert_E=self._own_counts(summaries),
            router_bias_E={name: router.bias_E for name, router in self.model.routers()} if speaks else {},
            token_counts=sum((summary.token_counts for summary in summaries), ZERO_TOKEN_COUNTS),
            votes=votes,
        )
        return all_reduce_step_totals(share, router_names(self.config), self.config.n_routed_experts, self.groups.world)

    def _own_counts(self, summaries: Sequence[MicroBatchMetrics]) -> dict[str, Tensor]:
        """Load of this rank's tokens, of every router here: each token is counted where it was routed from."""
        names = [name for name, _ in self.model.routers()]
        return {
            name: sum_counts([s.tokens_per_expert_E[name] for s in summaries if name in s.tokens_per_expert_E])
            for name in names
            if any(name in s.tokens_per_expert_E for s in summaries)
        }

    def _update(self, norm: float, counts_E: dict[str, Tensor], settings: StepSettings) -> None:
        if self.ema is not None:
            self.ema.wait()
        self.optimizer.step(settings.learning_rate, min(1.0, settings.clip_norm / norm) if norm > 0 else 1.0)
        if self.ema is not None:
            self.ema.start_update()
        for name, router in self.model.routers():
            update_router_bias(
                router.bias_E, to_device(counts_E[name], router.bias_E.device), settings.router_bias_update_rate
            )


def _bias_range(totals: StepTotals, speed: float) -> tuple[float, float]:
    """Of all routers after the step: every rank can work it out, because it knows all loads."""
    biases = []
    for name, before_E in totals.router_bias_E.items():
        after_E = before_E.clone()
        update_router_bias(after_E, totals.tokens_per_expert_E[name], speed)
        biases.append(after_E)
    if not biases:
        return 0.0, 0.0
    bias_NE = torch.stack(biases)
    return float(bias_NE.amin()), float(bias_NE.amax())


def count_targets(batch: TokenBatch, mtp_depth: int) -> Tensor:
    """Next-token targets that count in a loss: valid, and predicted from a valid position. int64, 0-dimensional."""
    reduction_length = batch.valid_BW.shape[1] - 1 - mtp_depth
    return (batch.valid_BW[:, :reduction_length] & batch.valid_BW[:, 1 : reduction_length + 1]).sum()


def sum_counts(counts: Sequence[Tensor]) -> Tensor:
    """Exact sum of int64 loads."""
    return torch.stack(list(counts)).sum(dim=0)
