"""One stack of layers split into stages, run by Shoestring's executor and by torch's pipelining.

Letters: R rows of a micro-batch, D width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import Schedule1F1B, ScheduleDualPipeV, ScheduleZBVZeroBubble

from shoestring.comm.groups import ProcessGroups
from shoestring.comm.topology import Topology
from shoestring.parallelism.pipeline.executor import PipelineExecutor, build_p2p_channels
from shoestring.parallelism.pipeline.instruction import Resumable
from shoestring.parallelism.pipeline.placement import StageLocation
from shoestring.parallelism.pipeline.schedules.registry import build_program
from shoestring.parallelism.weight_grad import DelayedWeightGradients, linear
from shoestring.trainer.model.split_backward import SplitBackward

PEERS = {
    "Schedule1F1B": ("1f1b", Schedule1F1B),
    "ScheduleDualPipeV": ("dualpipev", ScheduleDualPipeV),
    "ScheduleZBVZeroBubble": ("dualpipev", ScheduleZBVZeroBubble),
}
"""Names of torch's schedules, and of Shoestring's on the same stages."""


@dataclass(frozen=True)
class Sizes:
    width: int
    rows: int
    """Rows of one micro-batch."""
    micro_batches: int
    layers_per_stage: int
    dtype: torch.dtype = torch.float32


class Block(nn.Module):
    """Layer x + W₂ relu(W₁ x) for both; `product` multiplies."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(2 * width, width, dtype=dtype))
        self.down = nn.Parameter(torch.empty(width, 2 * width, dtype=dtype))

    def forward(self, x_RD: Tensor) -> Tensor:
        return x_RD + linear(linear(x_RD, self.up).relu(), self.down)


def stage_module(stage: int, sizes: Sizes) -> nn.Sequential:
    """Build the layers of one stage, with its weights."""
    module = nn.Sequential(*(Block(sizes.width, sizes.dtype) for _ in range(sizes.layers_per_stage)))
    generator = torch.Generator().manual_seed(stage)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return module


def inputs_and_targets(sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of a whole batch, [micro-batches · R, D] each."""
    generator = torch.Generator().manual_seed(99)
    x, target = torch.randn(2, sizes.micro_batches * sizes.rows, sizes.width, generator=generator).to(sizes.dtype)
    return x, target


def loss_of(out: Tensor, target: Tensor) -> Tensor:
    return ((out - target) ** 2).sum()


@dataclass
class ModuleStage:
    """Stage of plain modules for Shoestring's executor."""

    module: nn.Module
    is_first: bool
    is_last: bool
    inputs: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]
    phases: dict[int, SplitBackward] = field(default_factory=dict)

    def forward(self, micro_batch: int, received: Tensor | None) -> Resumable[Tensor | None]:
        yield from ()
        x = self.inputs[micro_batch] if self.is_first else received
        assert x is not None

        def run(x: Tensor) -> tuple[Tensor]:
            out: Tensor = self.module(x)
            return (loss_of(out, self.targets[micro_batch]) if self.is_last else out,)

        phase = self.phases[micro_batch] = SplitBackward(run, x)
        return None if self.is_last else phase.pop_outputs()[0]

    def backward(
        self, micro_batch: int, received: Tensor | None, weights: DelayedWeightGradients
    ) -> Resumable[Tensor | None]:
        yield from ()
        grad = torch.ones((), dtype=self.inputs[0].dtype) if self.is_last else received
        assert grad is not None
        (grad_input,) = self.phases.pop(micro_batch).backward_inputs(weights, grad)
        weights.flush_unless_deferred()
        return None if self.is_first else grad_input

    def empty_activation(self, micro_batch: int) -> Tensor:
        return torch.empty_like(self.inputs[micro_batch])


@dataclass(frozen=True)
class Peer:
    """Forward and backward of a batch on a pipeline."""

    step: Callable[[], None]
    modules: Mapping[int, nn.Module]
    """Layers of this rank, by stage."""
    close: Callable[[], None]

    def gradients(self) -> dict[tuple[int, str], Tensor]:
        """Return the gradients by stage and name, and clear them."""
        found = {}
        for stage, module in self.modules.items():
            for name, parameter in module.named_parameters():
                assert parameter.grad is not None
                found[stage, name] = parameter.grad
                parameter.grad = None
        return found


def ours(schedule: str, sizes: Sizes, rank: int, ranks: int) -> Peer:
    """Shoestring's executor."""
    groups = ProcessGroups.create(Topology(pp=ranks), rank, timedelta(seconds=60))
    program = build_program(schedule, ranks, sizes.micro_batches)
    lanes = build_p2p_channels(groups.pp_next, groups.pp_prev, torch.device("cpu"))
    executor = PipelineExecutor(program, rank, lanes, groups.pp_next.ranks)
    x, target = inputs_and_targets(sizes)
    placement, modules, stages = program.placement, {}, []
    for chunk in range(placement.chunks_per_rank):
        place = StageLocation(rank, chunk)
        module = modules[placement.stage_at(place)] = stage_module(placement.stage_at(place), sizes)
        ends = placement.is_first_stage(place), placement.is_last_stage(place)
        stages.append(ModuleStage(module, *ends, x.split(sizes.rows), target.split(sizes.rows)))

    def close() -> None:
        for lane in lanes.values():
            lane.close()

    return Peer(lambda: executor.run(stages), modules, close)


def theirs(name: str, sizes: Sizes, rank: int, ranks: int) -> Peer:
    """torch.distributed.pipelining."""
    schedule_class = PEERS[name][1]
    x, target = inputs_and_targets(sizes)
    in_v = schedule_class is not Schedule1F1B
    numbers = [rank, 2 * ranks - 1 - rank] if in_v else [rank]
    count = 2 * ranks if in_v else ranks
    modules: dict[int, nn.Module] = {number: stage_module(number, sizes) for number in numbers}
    device = torch.device("cpu")
    group = dist.new_group(list(range(ranks)), timeout=timedelta(seconds=60))
    stages = [PipelineStage(module, number, count, device, group=group) for number, module in modules.items()]
    schedule = schedule_class(stages if in_v else stages[0], sizes.micro_batches, loss_fn=loss_of, scale_grads=False)
    first, last = rank == 0, (rank == 0 if in_v else rank == ranks - 1)

    def step() -> None:
        losses: list[Tensor] | None = [] if last else None
        schedule.step(*((x,) if first else ()), target=target if last else None, losses=losses)

    return Peer(step, modules, lambda: None)
