"""DualPipeV over plain modules: two ranks hold four stages, and the losses are those of one process.

Run it: python dualpipev_modules.py
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shoestring.comm.groups import Group
from shoestring.launch.run.on_ranks import RankContext, run_on_ranks
from shoestring.parallelism.pipeline.executor import PipelineExecutor, build_p2p_channels
from shoestring.parallelism.pipeline.module_stage import ModuleStage
from shoestring.parallelism.pipeline.placement import StageLocation
from shoestring.parallelism.pipeline.schedules.registry import build_program

RANKS, MICRO_BATCHES, ROWS, WIDTH = 2, 8, 16, 32
PROGRAM = build_program("dualpipev", RANKS, MICRO_BATCHES)  # instructions per rank, as data
PLACEMENT = PROGRAM.placement


def make_stage(number: int) -> nn.Module:
    """Return one of the model's stages."""
    torch.manual_seed(number)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())


def micro_batch(number: int) -> Tensor:
    """Return the input of a micro-batch, [rows, width]."""
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(100 + number))


def loss(output: Tensor, number: int) -> Tensor:
    """Return the part of the loss of micro-batch `number`: here each of them counts alike."""
    return output.square().mean() / MICRO_BATCHES


def run_rank(context: RankContext, micro_batches: int) -> None:
    """Run forward and backward of every micro-batch as one rank."""
    rank = context.rank
    groups = [Group.from_process_group(dist.new_group()) for _ in range(2)]  # one per direction
    channels = build_p2p_channels(groups[0], groups[1], torch.device("cpu"))
    stages = []
    for place in (StageLocation(rank, chunk) for chunk in range(PLACEMENT.chunks_per_rank)):
        stages.append(
            ModuleStage(
                make_stage(PLACEMENT.stage_at(place)),
                activation=torch.empty(ROWS, WIDTH),
                inputs=[micro_batch(n) for n in range(micro_batches)] if PLACEMENT.is_first_stage(place) else None,
                loss=loss if PLACEMENT.is_last_stage(place) else None,
            )
        )
    PipelineExecutor(PROGRAM, rank, channels, groups[0].ranks).run(stages)
    for channel in channels.values():
        channel.close()
    losses = [each for stage in stages for _, each in sorted(stage.losses.items())]
    if losses:  # DualPipeV folds the stages: rank 0 holds the first and the last one
        print(f"rank {rank}: loss {torch.stack(losses).sum():.6f} over {len(losses)} micro-batches")


if __name__ == "__main__":
    run_on_ranks(run_rank, MICRO_BATCHES, RANKS, device="cpu")
    model = nn.Sequential(*(make_stage(number) for number in range(PLACEMENT.num_stages)))
    serial = sum(loss(model(micro_batch(number)), number) for number in range(MICRO_BATCHES))
    print(f"one process: loss {serial:.6f}")
