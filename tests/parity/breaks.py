"""Deliberate breaks, one of each convention. Each patches the package inside a worker, and says what must then differ.

Letters: B batch, S sequence, T tokens (B*S), D hidden, E experts, K top-k, N routers.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import MappingProxyType
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import shoestring.parallelism.zero.reduce as gradients_module
import shoestring.trainer.build as rank_module
import shoestring.trainer.run.step as step_module
from shoestring.comm.async_comm import FunctionWork
from shoestring.comm.groups import Group
from shoestring.parallelism.pipeline.instruction import Resumable
from shoestring.parallelism.pipeline.placement import StageLocation
from shoestring.parallelism.pipeline.program import PipelineProgram
from shoestring.parallelism.zero.bucket import Bucket
from shoestring.parallelism.zero.optimizer import ShardedOptimizer
from shoestring.parallelism.zero.reduce import GradientReducer
from shoestring.tests.parity.layouts import Layout, Load, Padding
from shoestring.trainer.data.samples import TokenBatch
from shoestring.trainer.model.forward_context import LossNormalizers
from shoestring.trainer.model.router import Router, RouterOutput, update_router_bias
from shoestring.trainer.run.stage_runner import StageRunner
from shoestring.trainer.run.step import Stepper, StepResult, StepSettings, count_targets
from shoestring.trainer.run.step_reduction import RankStepTotals, StepTotals, all_reduce_step_totals

Patch = AbstractContextManager[object]
MICRO_BATCHES = 2  # of the layouts that have more than one here


@dataclass(frozen=True)
class Break:
    """A convention, broken."""

    apply: Callable[[], Patch]
    layout: Layout
    """A layout in which the break is visible."""
    wrong: frozenset[str]
    """Exactly the quantities of `Errors` that differ after one step."""
    margin: float = 1e6
    """Factor by which they must exceed the tolerance: an error barely seen in a test is not seen in a run."""


def average_gradients() -> Patch:
    """Average over replicas instead of summing: dense gradients shrink by dp, those of experts by edp."""
    reduce = Group.reduce_scatter_sum

    def averaged(self: Group, shards_GN: Tensor, what: str) -> None:
        reduce(self, shards_GN, what)
        shards_GN[self.group_rank] /= self.size

    return patch.object(Group, "reduce_scatter_sum", averaged)


def reduce_in_bf16() -> Patch:
    """Round gradients to BF16 before they are sent, as some libraries do where weights are BF16."""
    reduce = Group.reduce_scatter_sum

    def rounded(self: Group, shards_GN: Tensor, what: str) -> None:
        reduce(self, shards_GN.copy_(shards_GN.bfloat16()), what)

    return patch.object(Group, "reduce_scatter_sum", rounded)


def forget_the_mirror() -> Patch:
    """Keep, on each of the two DualPipe ranks of a stage, the gradients of its own half of the batch."""
    return patch.object(Group, "reduce_scatter_sum", lambda self, shards_GN, what: None)


def reduce_after_the_first_backward() -> Patch:
    """Reduce a gradient after the first instruction that adds to it instead of the last."""

    def first_backward(program: PipelineProgram, rank: int, stages: Iterable[int]) -> int:
        wanted, placement = set(stages), program.placement
        works = ((index, each.backward) for index, each in enumerate(program.instructions[rank]))
        return next(i for i, work in works if work and placement.stage_at(StageLocation(rank, work.chunk)) in wanted)

    return patch.object(rank_module, "last_use", first_backward)


def skip_all_gather() -> Patch:
    """Update the weights of the rank's own shards only; all others stay old."""

    def keep(self: ShardedOptimizer, number: int) -> None:
        self.reducer.buckets[number].cast_masters_to_weights()

    return patch.object(ShardedOptimizer, "_hand_out", keep)


def sum_experts_over_every_rank() -> Patch:
    """Add gradients of different experts as if they were replicas."""

    def start(self: GradientReducer, bucket: Bucket) -> None:
        dist.all_reduce(bucket.grads_N)
        self._reducing.append(FunctionWork(lambda: None))

    return patch.object(GradientReducer, "_start", start)


def count_squares_once_a_replica() -> Patch:
    """Sum the squares of everything that each rank holds, so that a parameter counts once per replica."""

    def sum_of_squares(self: GradientReducer) -> Tensor:
        return gradients_module._sum_of_squares([bucket.grads_N for bucket in self.buckets])

    return patch.object(GradientReducer, "sum_of_squares", sum_of_squares)


def leave_out_other_shards() -> Patch:
    """Take the norm of this rank's shards for the norm of the whole model."""

    def own_squares(share: RankStepTotals, routers: Sequence[str], experts: int, world: Group) -> StepTotals:
        own = float(share.grad_square_sum)  # the sum replaces it
        return replace(all_reduce_step_totals(share, routers, experts, world), grad_square_sum=own)

    return patch.object(step_module, "all_reduce_step_totals", own_squares)


def count_padding() -> Patch:
    """Count padded tokens in the load, since they are routed."""
    forward = Router.forward

    def padded(self: Router, x_BSD: Tensor, valid_BS: Tensor) -> RouterOutput:
        routing = forward(self, x_BSD, valid_BS)
        return replace(
            routing,
            tokens_per_expert_E=torch.bincount(routing.expert_ids_TK.flatten(), minlength=self.config.n_routed_experts),
        )

    return patch.object(Router, "forward", padded)


def count_own_tokens() -> Patch:
    """Count this rank's tokens only."""

    def own_counts(share: RankStepTotals, routers: Sequence[str], experts: int, world: Group) -> StepTotals:
        return replace(
            all_reduce_step_totals(share, routers, experts, world), tokens_per_expert_E=dict(share.tokens_per_expert_E)
        )

    return patch.object(step_module, "all_reduce_step_totals", own_counts)


def flip_bias() -> Patch:
    """Make overloaded experts more attractive."""

    def flipped(bias_E: Tensor, counts_E: Tensor, speed: float) -> None:
        update_router_bias(bias_E, counts_E, -speed)

    return patch.object(step_module, "update_router_bias", flipped)


def put_bias_into_gates() -> Patch:
    """Compute gates from affinity + bias, by which experts were chosen, instead of the affinity alone (eq. 13-16)."""
    forward = Router.forward

    def biased(self: Router, x_BSD: Tensor, valid_BS: Tensor) -> RouterOutput:
        routing = forward(self, x_BSD, valid_BS)
        score_TE = F.linear(x_BSD.flatten(0, 1), self.weight).sigmoid() + self.bias_E
        gates_TK = score_TE.gather(1, routing.expert_ids_TK)
        gates_TK = gates_TK / gates_TK.sum(dim=-1, keepdim=True) * self.config.routed_scaling_factor
        return replace(routing, gates_TK=gates_TK)

    return patch.object(Router, "forward", biased)


def scale_balance_by_ranks() -> Patch:
    """Divide the balance loss by the rank's own sequences, so that the sum over ranks is too large by dp."""

    def scales(main_loss: float, mtp_loss: float, balance_loss: float) -> LossNormalizers:
        return LossNormalizers(main_loss, mtp_loss, balance_loss * torch.distributed.get_world_size())

    return patch.object(step_module, "LossNormalizers", scales)


def forget_mtp_depth() -> Patch:
    """Do not divide the weight of MTP by its depth (eq. 25)."""
    step = Stepper.step

    def undivided(
        self: Stepper, micro_batches: Sequence[TokenBatch], sequences: int, settings: StepSettings
    ) -> StepResult:
        weight = settings.mtp_loss_scaling_factor * self.config.num_nextn_predict_layers
        return step(self, micro_batches, sequences, replace(settings, mtp_loss_scaling_factor=weight))

    return patch.object(Stepper, "step", undivided)


def divide_mtp_by_own_targets() -> Patch:
    """Average the MTP loss of depth 1 over its own targets; a sequence that ends early has one fewer."""
    step = Stepper.step

    def own_mean(
        self: Stepper, micro_batches: Sequence[TokenBatch], sequences: int, settings: StepSettings
    ) -> StepResult:
        counts = torch.zeros(2, dtype=torch.int64)
        for batch in micro_batches:
            length = batch.valid_BW.shape[1] - 2
            own = (batch.valid_BW[:, :length] & batch.valid_BW[:, 2:]).sum()
            counts += torch.stack((count_targets(batch, 1), own))
        main, mtp = self.groups.world.all_reduce_sum(counts, "counts").tolist()
        return step(
            self,
            micro_batches,
            sequences,
            replace(settings, mtp_loss_scaling_factor=settings.mtp_loss_scaling_factor * main / mtp),
        )

    return patch.object(Stepper, "step", own_mean)


def average_each_micro_batch() -> Patch:
    """Average each micro-batch's loss, then average these: tokens of a short one weigh more."""
    forward = StageRunner.forward

    def averaged(self: StageRunner, micro_batch: int, received: Tensor | None) -> Resumable[Tensor | None]:
        assert self.loss_normalizers is not None
        targets = max(
            1, int(count_targets(self.micro_batches[micro_batch], self.chunk.model.config.num_nextn_predict_layers))
        )
        main = 1 / (targets * MICRO_BATCHES * torch.distributed.get_world_size())
        scales = replace(
            self.loss_normalizers,
            main_loss=main,
            mtp_loss=self.loss_normalizers.mtp_loss / self.loss_normalizers.main_loss * main,
        )
        return forward(replace(self, loss_normalizers=scales), micro_batch, received)

    return patch.object(StageRunner, "forward", averaged)


_GRADIENT = frozenset({"grad", "norm", "weights"})
_NORM = frozenset({"norm", "weights"})
_LOSS = _GRADIENT | {"total"}
_LOAD = frozenset({"counts", "bias"})

# Each of them is a row of the quick subset, where it is shown to be right when nothing is broken.
_TWO_RANKS = Layout(2, 1, 1, 1)
_TWO_REPLICAS = Layout(2, 2, 1, 1, Padding.RAGGED)
_PADDED = Layout(2, 1, MICRO_BATCHES, 1, Padding.RAGGED)
_TWO_DEPTHS = Layout(4, 1, 1, 2, Padding.RAGGED, Load.IDLE)
_PIPELINE = Layout(1, 2, 3, 1, Padding.EMPTY, pp=2, schedule="1f1b")
_MIRRORED = Layout(1, 1, 8, 1, Padding.RAGGED, pp=4, layers=5, schedule="dualpipe")
# With one routed layer, different gates cannot change a later router's choice.
_ONE_ROUTER = Layout(2, 1, 1, 0, Padding.RAGGED, layers=2)

BREAKS: Mapping[str, Break] = MappingProxyType(
    {
        "gradients averaged": Break(average_gradients, _TWO_RANKS, _GRADIENT),
        "experts summed over every rank": Break(sum_experts_over_every_rank, _TWO_RANKS, _GRADIENT),
        "gradients rounded to BF16": Break(reduce_in_bf16, _TWO_RANKS, _GRADIENT, margin=1e4),
        "half of a mirrored stage": Break(forget_the_mirror, _MIRRORED, _GRADIENT),
        "unfinished gradient reduced": Break(reduce_after_the_first_backward, _PIPELINE, _GRADIENT),
        "weights not all-gathered": Break(skip_all_gather, _TWO_RANKS, frozenset({"weights"})),
        "squares counted by replica": Break(count_squares_once_a_replica, _TWO_REPLICAS, _NORM),
        "squares of other ranks left out": Break(leave_out_other_shards, _TWO_RANKS, _NORM),
        "loss averaged by micro-batch": Break(average_each_micro_batch, _PADDED, _GRADIENT),
        "balance loss scaled by ranks": Break(scale_balance_by_ranks, _TWO_RANKS, _LOSS | {"balance"}),
        "MTP weight not divided by depth": Break(forget_mtp_depth, _TWO_DEPTHS, _LOSS),
        "MTP divided by its own targets": Break(divide_mtp_by_own_targets, _PADDED, _LOSS),
        "bias in the gates": Break(put_bias_into_gates, _ONE_ROUTER, _LOSS | {"main"}),
        "bias sign flipped": Break(flip_bias, _TWO_RANKS, frozenset({"bias"})),
        "padding counted in the load": Break(count_padding, _PADDED, _LOAD),
        "load of one rank": Break(count_own_tokens, _PADDED, _LOAD),
    }
)
