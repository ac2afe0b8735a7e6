"""Loss over the whole validation split, each target once, on all ranks together."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..comm.groups import ProcessGroups
from ..comm.host import to_device, to_host
from ..parallelism.pipeline.executor import Executor
from .data.batch import TokenBatch
from .data.samples import Samples
from .model.chunk import Chunk
from .running import RunningStage
from .step import count_targets


@torch.no_grad()
def evaluate(
    chunks: tuple[Chunk, ...],
    forwards: Callable[[int], Executor],
    samples: Samples,
    micro_batch: int,
    groups: ProcessGroups,
    device: torch.device,
) -> tuple[float, int]:
    """Mean cross-entropy of the next token in nats, and over how many targets.

    `forwards` makes the program of so many forwards. Every rank runs as many micro-batches, the last ones of padding
    alone: the exchange needs all ranks of a group.
    """
    topology = groups.topology
    share = topology.dp * micro_batch
    rounds = -(-len(samples) // share)
    first = topology.dp_rank(groups.rank) * micro_batch
    starts = [index * share + first for index in range(rounds)]
    batches = [padded_batch(samples, range(start, start + micro_batch)).to(device) for start in starts]
    stages = [RunningStage(chunk, batches) for chunk in chunks]
    with chunks[0].model.weights_unchanged():
        forwards(rounds).run(stages)
    depth = chunks[0].model.config.mtp_depth
    loss_sum = sum(float(summary.main_sum) for stage in stages for summary in stage.summaries)
    targets = sum(int(count_targets(batch, depth)) for batch in batches) if groups.pp_rank == 0 else 0
    own = to_device(torch.tensor((loss_sum, targets), dtype=torch.float64), device)
    total, count = to_host(groups.world.all_reduce_sum(own, "sum of validation losses")).tolist()
    return total / count, int(count)


def padded_batch(samples: Samples, indices: range) -> TokenBatch:
    """Samples by number; numbers past the end give samples that are padding throughout."""
    batch = samples.batch([min(index, len(samples) - 1) for index in indices])
    exists_B = torch.tensor([index < len(samples) for index in indices])
    return TokenBatch(batch.tokens_BW, batch.valid_BW & exists_B[:, None])
