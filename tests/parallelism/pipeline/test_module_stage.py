"""Plain modules under the executor: losses and gradients of one process, and where W has work."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from shoestring.comm.groups import Group
from shoestring.parallelism.pipeline.executor import PipelineExecutor, build_p2p_channels
from shoestring.parallelism.pipeline.instruction import run_to_completion
from shoestring.parallelism.pipeline.module_stage import ModuleStage
from shoestring.parallelism.pipeline.placement import StageLocation
from shoestring.parallelism.pipeline.schedules.registry import SCHEDULES, build_placement, build_program
from shoestring.parallelism.weight_grad import DelayedWeightGradients, linear
from shoestring.tests.processes import World, run_processes

VOCABULARY, WIDTH, ROWS, MICRO_BATCHES, RANKS = 11, 4, 3, 8, 2
Result = tuple[dict[int, Tensor], dict[int, list[Tensor]]]
"""Losses by micro-batch, and the gradients of the parameters by stage."""


class SplitLinear(nn.Linear):
    """A Linear whose weight gradient waits for W."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight) + self.bias


def module_of(stage: int) -> nn.Module:
    torch.manual_seed(stage)
    if stage == 0:
        return nn.Embedding(VOCABULARY, WIDTH, dtype=torch.float64)
    kind = SplitLinear if stage % 2 else nn.Linear
    return nn.Sequential(kind(WIDTH, WIDTH), nn.Tanh()).double()


def loss_of(output: Tensor, micro_batch: int) -> Tensor:
    return (1 + micro_batch) * output.square().mean()


def tokens() -> list[Tensor]:
    generator = torch.Generator().manual_seed(50)
    return list(torch.randint(VOCABULARY, (MICRO_BATCHES, ROWS), generator=generator))


def gradients(module: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]


def run(world: World, schedule: str) -> Result:
    program = build_program(schedule, world.size, MICRO_BATCHES)
    limit = timedelta(seconds=30)
    groups = [Group.from_process_group(dist.new_group(timeout=limit), limit) for _ in range(2)]
    channels = build_p2p_channels(groups[0], groups[1], torch.device("cpu"))
    executor = PipelineExecutor(program, world.rank, channels, groups[0].ranks)
    placement, modules, stages = program.placement, {}, []
    for place in (StageLocation(world.rank, chunk) for chunk in range(placement.chunks_per_rank)):
        module = modules[placement.stage_at(place)] = module_of(placement.stage_at(place))
        inputs = tokens() if placement.is_first_stage(place) else None
        loss = loss_of if placement.is_last_stage(place) else None
        stages.append(ModuleStage(module, torch.empty(ROWS, WIDTH, dtype=torch.float64), inputs=inputs, loss=loss))
    executor.run(stages)
    for channel in channels.values():
        channel.close()
    losses = {number: loss for stage in stages for number, loss in stage.losses.items()}
    return losses, {number: gradients(module) for number, module in modules.items()}


def serial(stages: int) -> Result:
    modules, losses = [module_of(stage) for stage in range(stages)], {}
    for number, x in enumerate(tokens()):
        losses[number] = loss_of(nn.Sequential(*modules)(x), number)
        losses[number].backward()
    detached = {number: loss.detach() for number, loss in losses.items()}
    return detached, {stage: gradients(module) for stage, module in enumerate(modules)}


@pytest.mark.parametrize("schedule", [each.name for each in SCHEDULES])
def test_losses_and_gradients_are_those_of_one_process(schedule: str) -> None:
    expected_losses, expected = serial(build_placement(schedule, RANKS).num_stages)
    losses: dict[int, Tensor] = {}
    sums: dict[int, list[Tensor]] = {}
    for each_losses, each in run_processes(RANKS, run, schedule):
        losses |= each_losses
        for stage, grads in each.items():  # DualPipe holds each stage twice
            sums[stage] = [a + b for a, b in zip(sums[stage], grads, strict=True)] if stage in sums else grads
    torch.testing.assert_close(losses, expected_losses, rtol=0, atol=0)
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=1e-12)


def test_only_a_split_weight_waits_for_w() -> None:
    received = torch.randn(ROWS, WIDTH, dtype=torch.float64)
    for number in (1, 2):
        module = module_of(number)
        stage, weights = ModuleStage(module, received), DelayedWeightGradients(deferred=True)
        run_to_completion(stage.forward(0, received))
        grad = run_to_completion(stage.backward(0, torch.ones_like(received), weights))
        assert grad is not None
        before = [parameter.dim() for parameter in module.parameters() if parameter.grad is not None]
        assert before == ([1] if number == 1 else [2, 1])  # the split weight has none before W
        weights.flush()
        assert len(gradients(module)) == 2


def test_a_forward_without_gradients_keeps_nothing() -> None:
    stage = ModuleStage(module_of(1), torch.empty(0))
    with torch.no_grad():
        run_to_completion(stage.forward(0, torch.zeros(ROWS, WIDTH, dtype=torch.float64)))
    assert not stage._saved
