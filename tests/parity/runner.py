"""Runs one layout in real processes, through the real stepper and optimizer, and compares it with the reference.

Letters: B batch of one micro-batch, W window of tokens, E experts.
"""

from collections.abc import Iterator
from contextlib import closing, nullcontext
from datetime import timedelta

import torch
from torch import Tensor

from shoestring.comm.async_comm import AsyncCommunicator, CollectiveOrderCheck, build_async_communicator
from shoestring.comm.exchange.config import ExchangeConfig
from shoestring.comm.exchange.factory import build_token_exchange
from shoestring.comm.groups import ProcessGroups
from shoestring.comm.streams import DeviceStreams
from shoestring.comm.trace import NULL_RECORDER, SpanRecorder
from shoestring.comm.traffic import TrafficCounter
from shoestring.parallelism.zero.reduce import GradientReducer
from shoestring.tests.parity.breaks import BREAKS
from shoestring.tests.parity.layouts import (
    ADAM_EPS,
    BIAS_SPEED,
    Layout,
    clip_norm,
    global_batch,
    learning_rate,
    start_params,
)
from shoestring.tests.parity.outcome import Errors, Outcome, StepOutcome, compare
from shoestring.tests.parity.single_process import run_single_process
from shoestring.tests.processes import World, run_processes
from shoestring.tests.trainer.model.released import (
    load_released,
    model_config,
    released_gradients,
    released_parts,
)
from shoestring.trainer.build import PipelineRuntime, build_stepper
from shoestring.trainer.data.samples import TokenBatch
from shoestring.trainer.model.model import Model
from shoestring.trainer.model.stage_layout import StageLayout
from shoestring.trainer.optimizer.config import OptimizerConfig
from shoestring.trainer.precision.fp8 import Fp8LinearOps
from shoestring.trainer.precision.reference import ReferenceBackend
from shoestring.trainer.run.step import Stepper, StepSettings


def run_layout(layout: Layout, steps: int, break_name: str | None = None) -> Errors:
    """Return how far the first `steps` steps of `layout` are from the reference, with one deliberate break or none."""
    ranks = run_processes(layout.topology.world_size, run_rank, layout, steps, break_name)
    return compare(ranks, run_single_process(layout, steps))


def run_rank(world: World, layout: Layout, steps: int, break_name: str | None) -> Outcome:
    """Train one rank; return its outcome."""
    broken = nullcontext() if break_name is None else BREAKS[break_name].apply()
    stages = layout.stages
    groups = ProcessGroups.create(layout.topology, world.rank, timedelta(seconds=60), stages.replica_pp_groups())
    order = CollectiveOrderCheck(groups.ep)
    with broken, closing(build_async_communicator(groups.ep, torch.device("cpu"), order)) as worker:
        stepper, gradients = build(layout, stages, groups, worker)
        records = tuple(take_step(stepper, gradients, layout, step, world.rank) for step in range(steps))
        stepper.optimizer.wait_for_weights()
    return outcome(records, gradients)


def outcome(records: tuple[StepOutcome, ...], gradients: "RecordingReducer") -> Outcome:
    """Return the outcome of one rank's steps."""
    parts = {name: (value.detach().clone(), trained) for name, value, trained in released_parts(gradients.model)}
    return Outcome(
        records,
        weights={name: value for name, (value, trained) in parts.items() if trained},
        biases={name: value for name, (value, trained) in parts.items() if not trained},
    )


class RecordingReducer(GradientReducer):
    """Keeps a copy of the reduced gradients at the moment their squares are summed: clipping comes after.

    A rank has its own shards of them, and is given the others' here.
    """

    def __init__(self, reducer: GradientReducer, model: Model) -> None:
        vars(self).update(vars(reducer))
        self.model = model
        self.seen: list[dict[str, Tensor]] = []

    def sum_of_squares(self) -> Tensor:
        for bucket in self.buckets:
            bucket.group.all_gather(bucket.grads_GN, "gradients for a test")
        self.seen.append(released_gradients(self.model))
        return super().sum_of_squares()


def build(
    layout: Layout,
    stages: StageLayout,
    groups: ProcessGroups,
    worker: AsyncCommunicator,
    recorder: SpanRecorder = NULL_RECORDER,
    compute: torch.dtype | None = None,
    streams: DeviceStreams | None = None,
) -> tuple[Stepper, RecordingReducer]:
    """Build what `trainer.build.build_rank_resources` builds, with the reference's weights, no data and no checkpoints.

    It computes in the layout's dtype, unless `compute` is another. Communication is queued on `streams`, if any.
    """
    topology, rank = layout.topology, groups.rank
    model = Model(model_config(layout.config), stages.model_shard(topology, rank))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(layout.dtype)
    load_released(model, start_params(layout))
    if layout.block is not None:
        model.set_expert_block_rows(layout.block)
    if layout.fp8:
        model.enable_fp8(Fp8LinearOps(ReferenceBackend()))
    config = ExchangeConfig(name=layout.exchange, dispatch=layout.wire, combine_backward=layout.wire)
    traffic = TrafficCounter(topology, rank)
    exchange = build_token_exchange(config, groups, layout.config.n_routed_experts, worker, traffic)
    cpu = torch.device("cpu")
    pipeline = PipelineRuntime(
        stages,
        groups,
        cpu,
        overlap=layout.overlap,
        recorder=recorder,
        recompute=layout.recompute,
        streams=streams,
    )
    # BF16 moments are compared by the element, in tests/trainer/optimizer: rounding is no error of a layout.
    optimizer = OptimizerConfig(eps=ADAM_EPS, moments="auto" if layout.dtype == torch.float64 else "float32")
    stepper = build_stepper(pipeline, model, exchange, compute or layout.dtype, layout.micro_batches, optimizer)
    gradients = RecordingReducer(stepper.optimizer.reducer, model)
    stepper.optimizer.reducer = gradients
    return stepper, gradients


def take_step(stepper: Stepper, gradients: RecordingReducer, layout: Layout, step: int, rank: int) -> StepOutcome:
    config = layout.config
    settings = StepSettings(
        learning_rate=learning_rate(step),
        clip_norm=clip_norm(step),
        seq_aux_loss_coeff=config.balance_alpha,
        mtp_loss_scaling_factor=config.mtp_weight,
        router_bias_update_rate=BIAS_SPEED,
    )
    result = stepper.step(list(_micro_batches(layout, step, rank)), layout.sequences_of(step), settings)
    routed_layers = range(config.first_k_dense_replace, config.num_hidden_layers + config.num_nextn_predict_layers)
    return StepOutcome(
        total=result.total_loss,
        main=result.loss,
        mtp=result.mtp_loss * config.mtp_weight,
        balance=result.balance_loss,
        norm=result.grad_norm,
        gradients=gradients.seen[-1],
        counts_E=dict(zip(routed_layers, result.totals.tokens_per_expert_E.values(), strict=True)),
    )


def _micro_batches(layout: Layout, step: int, rank: int) -> Iterator[TokenBatch]:
    """Yield this rank's share of the global batch: each round of micro-batches takes neighboring sequences."""
    tokens_BW, valid_BW = global_batch(layout, step)
    size, ranks = layout.sequences_per_micro_batch, layout.topology.dp
    for index in range(layout.micro_batches_of(step)):
        first = (index * ranks + layout.topology.dp_rank(rank)) * size
        yield TokenBatch(tokens_BW[first : first + size], valid_BW[first : first + size])
