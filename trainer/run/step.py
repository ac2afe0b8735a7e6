"""One optimizer step over a global batch; its result does not depend on how batch and model are distributed."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...comm.exchange.permutation import ZERO_TOKEN_COUNTS
from ...comm.groups import ProcessGroups
from ...comm.host_transfer import to_device, to_host
from ...comm.trace import GRADIENT_SYNC_WAIT, NULL_RECORDER, OPTIMIZER, SpanRecorder, TimelineTrack
from ...comm.warm_up import warm_up_all_reduce
from ...parallelism.pipeline.executor import PipelineExecutor
from ...parallelism.pipeline.liveness import first_use, last_use
from ...parallelism.zero.optimizer import ShardedOptimizer
from ..config import RunConfig, scheduled_value
from ..data.samples import TokenBatch
from ..model.chunk import Chunk
from ..model.config import ModelConfig
from ..model.forward_context import LossNormalizers, MicroBatchMetrics
from ..model.model import Model, router_names
from ..model.router import update_router_bias
from ..optimizer.ema import WeightEMA
from .stage_runner import StageRunner
from .step_reduction import RankStepTotals, StepTotals, all_reduce_step_totals, reduction_length

HOST_READS_PER_STEP = 2
"""Host-device synchronizations per step: the target count before the first forward, and the step totals at the end
(`step_reduction.py`). In addition a rank waits once per dispatch (see `TokenExchange`), and inside an FB for nothing
else."""

_VOTES = 4
"""Number of votes of the training loop."""
VoteSource = Callable[[], Sequence[bool]]
"""Function that returns this rank's votes (halt, save results); called once per step, shortly before its end."""


class NonFiniteStep(RuntimeError):  # noqa: N818 -- says what happened
    """Error for a loss or gradient that is NaN or Inf. Raised on every rank, before any weight has changed."""


@dataclass(frozen=True)
class StepSettings:
    """Hyperparameters of one step."""

    learning_rate: float
    clip_norm: float
    seq_aux_loss_coeff: float
    mtp_loss_scaling_factor: float
    router_bias_update_rate: float

    @staticmethod
    def at_step(config: RunConfig, step: int) -> "StepSettings":
        """Return those of step number `step`, from 1."""
        training, before = config.training, config.tokens_after(step - 1)
        return StepSettings(
            learning_rate=config.optimizer.learning_rate_at(config.tokens_after(step)),
            clip_norm=config.optimizer.clip_norm,
            seq_aux_loss_coeff=training.seq_aux_loss_coeff,
            mtp_loss_scaling_factor=scheduled_value(training.mtp_loss_scaling_factor, before),
            router_bias_update_rate=scheduled_value(training.router_bias_update_rate, before),
        )


@dataclass(frozen=True)
class StepResult:
    """Result of a step over the whole global batch, equal on every rank."""

    loss: float
    """Mean cross-entropy of the next token, in nats, over all valid targets."""
    mtp_loss: float
    """Mean cross-entropy of the MTP depths, in nats; 0 without MTP."""
    balance_loss: float
    """α times the mean over sequences of the balance loss, summed over routed layers."""
    total_loss: float
    """The loss that is differentiated: main, weighted MTP and balance losses."""
    grad_norm: float
    """L2 norm of the gradients before clipping."""
    totals: StepTotals
    """Sums over all ranks; its token counts are those of all MoE layers together, padding included."""
    router_bias_range: tuple[float, float]
    """Smallest and largest routing bias after the step; zeros without routers."""


@dataclass
class Stepper:
    """One rank's model, optimizer and groups, which run its steps."""

    model: Model
    chunks: tuple[Chunk, ...]
    executor: PipelineExecutor
    """Executor of the last step, or of the first one before it runs."""
    build_executor: Callable[[int], PipelineExecutor]
    """Function from the number of micro-batches, which the batch ramp changes, to an executor."""
    optimizer: ShardedOptimizer
    bucket_stages: tuple[tuple[int, ...], ...]
    """Stages that compute with each bucket of the optimizer."""
    ema: WeightEMA | None
    groups: ProcessGroups
    recorder: SpanRecorder = NULL_RECORDER

    @property
    def config(self) -> ModelConfig:
        """Configuration of the whole model."""
        return self.model.config

    def warm_up_communication(self, device: torch.device) -> None:
        """Connect all communicators of a step except those of the token exchange. Collective.

        `comm.warm_up` gives the reason.
        """
        self.executor.connect_neighbors(device)
        self.optimizer.warm_up_collectives()
        one_number = torch.zeros(1, dtype=torch.float64, device=device)
        routers = len(router_names(self.config))
        # The two sizes of a step's all-reduces: NCCL picks the algorithm by size and connects each one separately.
        for like in (one_number, one_number.expand(reduction_length(routers, self.config.n_routed_experts, _VOTES))):
            warm_up_all_reduce(self.groups.world, like)

    def step(
        self, micro_batches: Sequence[TokenBatch], sequences: int, settings: StepSettings, votes: VoteSource = tuple
    ) -> StepResult:
        """Run forward and backward, reduce and clip gradients, update weights and routing biases.

        `micro_batches` are this rank's share of a global batch of `sequences`. The all-gather of the new weights may
        still run afterwards: see `ShardedOptimizer.wait_for_weights`. Raises `NonFiniteStep`.
        """
        with self.recorder.span(TimelineTrack.INSTRUCTION, GRADIENT_SYNC_WAIT):
            targets = self._count_targets(micro_batches)
        depth = self.config.num_nextn_predict_layers
        # The losses are divided by counts of the whole global batch, not averaged over micro-batches or ranks: these
        # hold different numbers of valid targets, and the result would depend on the grid.
        normalizers = LossNormalizers(
            main_loss=1 / targets,
            mtp_loss=settings.mtp_loss_scaling_factor / (max(depth, 1) * targets),
            balance_loss=settings.seq_aux_loss_coeff / sequences,
        )
        self.optimizer.reducer.begin_step()
        summaries = list(self._forward_backward(micro_batches, normalizers))
        with self.recorder.span(TimelineTrack.INSTRUCTION, GRADIENT_SYNC_WAIT):
            self.optimizer.reducer.finish_reduction()
            totals = self._sum_over_ranks(summaries, votes())
        # Checked on sums that all ranks share: all of them stop here, and the weights of the step before are intact.
        main, mtp, balance = totals.loss_sums
        norm = math.sqrt(totals.grad_square_sum)
        total = main * normalizers.main_loss + mtp * normalizers.mtp_loss + balance * normalizers.balance_loss
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise NonFiniteStep(f"loss {total}, gradient norm {norm}: not finite, so no weight was changed")
        with self.recorder.span(TimelineTrack.INSTRUCTION, OPTIMIZER):
            self._update(norm, totals.tokens_per_expert_E, settings)
        return StepResult(
            loss=main / targets,
            mtp_loss=mtp / (max(depth, 1) * targets),
            balance_loss=balance * normalizers.balance_loss,
            total_loss=total,
            grad_norm=norm,
            totals=totals,
            router_bias_range=_router_bias_range(totals, settings.router_bias_update_rate),
        )

    def _count_targets(self, micro_batches: Sequence[TokenBatch]) -> int:
        """Return the number of valid next-token targets of the global batch."""
        # Needed before the first backward: each loss is scaled once, so gradients need no division afterwards.
        counts = [count_targets(batch, self.config.num_nextn_predict_layers) for batch in micro_batches]
        count = to_host(self.groups.world.all_reduce_sum(sum_counts(counts), "count of valid targets"))
        # The ranks of a pipeline read the same samples, so the sum over the world counts each target pp times.
        # max: a batch of padding alone must not divide by 0.
        return max(1, int(count.item()) // self.groups.topology.pp)

    def _forward_backward(
        self, micro_batches: Sequence[TokenBatch], normalizers: LossNormalizers
    ) -> Iterator[MicroBatchMetrics]:
        """Run the schedule; yield the metrics of each micro-batch in each stage of this rank."""
        stages = [StageRunner(chunk, micro_batches, normalizers) for chunk in self.chunks]
        self._set_micro_batches(len(micro_batches))
        # Weights do not change within a step: they are quantized to FP8 once, not once per micro-batch.
        with self.model.cache_fp8_weights():
            self.executor.run(stages, self.optimizer)
        for stage in stages:
            yield from stage.metrics

    def _set_micro_batches(self, count: int) -> None:
        """Rebuild the executor if the number of micro-batches has changed, and tell the optimizer."""
        # One executor is enough: a batch ramp only grows, so an old program never comes back.
        if count == self.executor.program.num_micro_batches:
            return
        self.executor = self.build_executor(count)
        program, rank = self.executor.program, self.executor.pp_rank
        # The optimizer overlaps its communication with instructions by index: reduce after the last use of a bucket,
        # wait for its weights before the first. Another program has other indices.
        self.optimizer.set_schedule(
            first_use=[first_use(program, rank, users) for users in self.bucket_stages],
            last_use=[last_use(program, rank, users) for users in self.bucket_stages],
        )

    def _sum_over_ranks(self, summaries: Sequence[MicroBatchMetrics], votes: Sequence[bool]) -> StepTotals:
        """Sum losses, gradient norm, loads and votes over all ranks."""
        # FP64: the sum of many FP32 losses must not visibly depend on how ranks and micro-batches group them.
        per_batch = [
            torch.stack((s.main_loss_sum.double(), s.mtp_loss_sum.double(), s.balance_loss_sum.double()))
            for s in summaries
        ]
        # The routers of a pipeline rank are equal on all its data-parallel ranks: the first one sends them.
        is_first_dp_rank = self.groups.topology.dp_rank(self.groups.rank) == 0
        share = RankStepTotals(
            loss_sums=torch.stack(per_batch).sum(dim=0),
            grad_square_sum=self.optimizer.reducer.sum_of_squares(),
            tokens_per_expert_E=self._local_expert_counts(summaries),
            router_bias_E={name: router.bias_E for name, router in self.model.routers()} if is_first_dp_rank else {},
            token_counts=sum((summary.token_counts for summary in summaries), ZERO_TOKEN_COUNTS),
            votes=votes,
        )
        return all_reduce_step_totals(share, router_names(self.config), self.config.n_routed_experts, self.groups.world)

    def _local_expert_counts(self, summaries: Sequence[MicroBatchMetrics]) -> dict[str, Tensor]:
        """Return the expert loads of this rank's tokens, by local router."""
        names = [name for name, _ in self.model.routers()]
        return {
            name: sum_counts([s.tokens_per_expert_E[name] for s in summaries if name in s.tokens_per_expert_E])
            for name in names
            if any(name in s.tokens_per_expert_E for s in summaries)
        }

    def _update(self, norm: float, counts_E: dict[str, Tensor], settings: StepSettings) -> None:
        if self.ema is not None:
            # The average of the last step still reads the master weights that this update overwrites.
            self.ema.wait()
        self.optimizer.step(settings.learning_rate, min(1.0, settings.clip_norm / norm) if norm > 0 else 1.0)
        if self.ema is not None:
            self.ema.start_update()
        for name, router in self.model.routers():
            update_router_bias(
                router.bias_E, to_device(counts_E[name], router.bias_E.device), settings.router_bias_update_rate
            )


def _router_bias_range(totals: StepTotals, speed: float) -> tuple[float, float]:
    """Return the smallest and largest routing bias of all routers after the step."""
    # Every rank knows all biases and loads, so it computes the update of all routers without another collective.
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
    """Return the number of targets that count in the loss (valid, and predicted from a valid position): int64 []."""
    reduction_length = batch.valid_BW.shape[1] - 1 - mtp_depth
    return (batch.valid_BW[:, :reduction_length] & batch.valid_BW[:, 1 : reduction_length + 1]).sum()


def sum_counts(counts: Sequence[Tensor]) -> Tensor:
    """Return the exact sum of int64 counts."""
    return torch.stack(list(counts)).sum(dim=0)
