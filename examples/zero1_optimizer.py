"""ZeRO-1 alone: a plain module on two ranks, each of which holds half of the optimizer's state.

Run it: python zero1_optimizer.py
"""

import torch
import torch.distributed as dist
from torch import nn

from shoestring.comm.groups import Group
from shoestring.launch.run.on_ranks import RankContext, run_on_ranks
from shoestring.parallelism.zero import ShardedOptimizer
from shoestring.trainer.optimizer.adamw import AdamW
from shoestring.trainer.optimizer.config import OptimizerConfig

RANKS, ROWS, WIDTH, STEPS, RATE = 2, 64, 32, 50, 0.01


def train(context: RankContext, steps: int) -> None:
    """Train on this rank's rows; the weights stay equal on all ranks."""
    rank = context.rank
    torch.manual_seed(0)  # the same weights on every rank
    model = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)).to(torch.bfloat16)
    group = Group.from_process_group(dist.new_group())  # of its own: the optimizer's thread uses it
    update = AdamW(OptimizerConfig(weight_decay=0.1))
    optimizer = ShardedOptimizer.over_parameters(model.named_parameters(), group, update)
    rows = torch.randn(ROWS, WIDTH, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1 + rank))
    for step in range(steps):
        optimizer.reducer.begin_step()  # in place of zero_grad: gradients are views of FP32 buckets
        loss = (model(rows) - rows).square().mean()
        loss.backward()
        optimizer.reducer.finish_reduction()
        norm = optimizer.reducer.gradient_norm(group) / RANKS
        optimizer.step(RATE, grad_scale=min(1.0, 1.0 / norm) / RANKS)  # the mean over ranks, clipped to norm 1
        optimizer.wait_for_weights()
        if rank == 0 and step in (0, steps - 1):
            print(f"step {step}: loss {loss.item():.4f}, gradient norm {norm:.4f}")
    held = sum(shard.master.numel() for shard in optimizer.local_shards())
    weights = sum(parameter.numel() for parameter in model.parameters())
    print(f"rank {rank} holds masters and moments of {held:,} of {weights:,} weights")
    optimizer.close()


if __name__ == "__main__":
    run_on_ranks(train, STEPS, RANKS, device="cpu")
