"""Loss over the whole validation split, each target once, on all ranks together."""

from __future__ import annotations

import torch

from ..comm.groups import ProcessGroups
from .data.batch import TokenBatch
from .data.samples import Samples
from .model.chunk import Chunk, drive
from .step import count_targets


@torch.no_grad()
def evaluate(
    chunk: Chunk, samples: Samples, micro_batch: int, groups: ProcessGroups, device: torch.device
) -> tuple[float, int]:
    """Mean cross-entropy of the next token in nats, and over how many targets.

    Every rank runs as many micro-batches, the last ones of padding alone: the exchange needs all ranks of a group.
    """
    topology = groups.topology
    share = topology.dp * micro_batch
    rounds = -(-len(samples) // share)
    first = topology.dp_rank(groups.rank) * micro_batch
    total = torch.zeros(2, dtype=torch.float64)
    for index in range(rounds):
        start = index * share + first
        batch = padded_batch(samples, range(start, start + micro_batch)).to(device)
        forward = drive(chunk.losses(batch.tokens_BW, batch.valid_BW, index))
        targets = count_targets(batch, chunk.model.config.mtp_depth)
        total += torch.stack((forward.main_sum.double(), targets.double())).cpu()
    loss_sum, targets_sum = groups.dense_dp.all_reduce_sum(total, "sum of validation losses").tolist()
    return loss_sum / targets_sum, int(targets_sum)


def padded_batch(samples: Samples, indices: range) -> TokenBatch:
    """Samples by number; numbers past the end give samples that are padding throughout."""
    batch = samples.batch([min(index, len(samples) - 1) for index in indices])
    exists_B = torch.tensor([index < len(samples) for index in indices])
    return TokenBatch(batch.tokens_BW, batch.valid_BW & exists_B[:, None])
