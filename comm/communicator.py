"""Collectives of NCCL and of gloo over one process group; `Group` adds errors and the watchdog.

Letters: G ranks of the group, N elements of a shard, M members.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

PeerTensors = Sequence[tuple[Tensor, int]]
"""(tensor, global rank of the peer) pairs."""

# Elements that a reduction on gloo receives before it adds them: 16 MB in FP32. A bucket of a whole stage would else
# need a second copy of itself.
REDUCE_STAGING_ELEMENTS = 2**22


class Collectives:
    """Collective operations over one process group, in place, as torch runs them on NCCL. Not yet run on hardware.

    On a GPU an operation returns when it is queued on the current stream, which waits for its end; on a CPU, when it is
    done. NCCL blocks the host in a first call until the other ranks make theirs: see `warm_up`. Raises `RuntimeError`,
    which `Group` turns into `CollectiveError`.
    """

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        self.process_group = process_group

    def all_reduce(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
        """Replace `tensor` by its reduction over the group."""
        dist.all_reduce(tensor, operation, group=self.process_group)

    def all_to_all(self, arrived: Tensor, sent: Tensor, received_M: Sequence[int], sent_M: Sequence[int]) -> None:
        """Send `sent_M[i]` rows to rank i and fill `arrived` with `received_M[i]` rows from each rank i."""
        dist.all_to_all_single(arrived, sent, list(received_M), list(sent_M), group=self.process_group)

    def reduce_scatter(self, own_N: Tensor, shards_GN: Tensor) -> None:
        """Replace `own_N`, the local row of `shards_GN`, by its sum over the group."""
        _reduce_scatter(own_N, shards_GN, group=self.process_group)  # NCCL allows this rank's row to be the result

    def all_gather(self, shards_GN: Tensor, own_N: Tensor) -> None:
        """Fill row i of `shards_GN` with the `own_N` of rank i."""
        _all_gather(shards_GN, own_N, group=self.process_group)  # NCCL allows `own_N` to be this rank's row

    def send_and_receive(self, sends: PeerTensors, receives: PeerTensors) -> None:
        """Exchange P2P messages as one batch, which ends when every message in it has been matched."""
        operations = [
            *(dist.P2POp(dist.isend, tensor, peer, self.process_group) for tensor, peer in sends),
            *(dist.P2POp(dist.irecv, tensor, peer, self.process_group) for tensor, peer in receives),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()  # no timeout: with one, the host itself would block until the neighbor has sent


class GlooCollectives(Collectives):
    """gloo, for tensors on the host. The caller waits until an operation is done, at most `timeout`."""

    def __init__(self, process_group: dist.ProcessGroup, ranks: tuple[int, ...], rank: int, timeout: timedelta) -> None:
        super().__init__(process_group)
        self._ranks, self._group_rank, self._timeout = ranks, ranks.index(rank), timeout

    @override
    def all_to_all(self, arrived: Tensor, sent: Tensor, received_M: Sequence[int], sent_M: Sequence[int]) -> None:
        # gloo's own all-to-all often sends in one direction after the other: twice the time on a slow link.
        self._exchange_messages(arrived.split(list(received_M)), sent.split(list(sent_M)))

    @override
    def reduce_scatter(self, own_N: Tensor, shards_GN: Tensor) -> None:
        # Each rank sums its shard: first the local part, then the others' in rank order. gloo's own reduce-scatter is
        # an all-reduce, which sends twice the bytes.
        piece = max(1, REDUCE_STAGING_ELEMENTS // len(self._ranks))
        for begin in range(0, own_N.numel(), piece):
            part_GM = shards_GN[:, begin : begin + piece]
            arrived_GM = torch.empty_like(part_GM, memory_format=torch.contiguous_format)
            self._exchange_messages(arrived_GM.unbind(), part_GM.unbind())
            # A fixed order of summation makes the result equal to the last bit from run to run.
            for index, arrived_M in enumerate(arrived_GM):
                if index != self._group_rank:
                    own_N[begin : begin + piece] += arrived_M

    @override
    def all_gather(self, shards_GN: Tensor, own_N: Tensor) -> None:
        self._exchange_messages(shards_GN.unbind(), [own_N] * len(self._ranks))

    @override
    def send_and_receive(self, sends: PeerTensors, receives: PeerTensors) -> None:
        # Everything is posted before anything is waited for: two ranks that send first and wait would block each other.
        works = [dist.irecv(tensor, src=peer, group=self.process_group) for tensor, peer in receives]
        works += [dist.isend(tensor, dst=peer, group=self.process_group) for tensor, peer in sends]
        for work in works:
            if work is not None:
                work.wait(self._timeout)

    def _exchange_messages(self, buffers: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
        """Send `parts[i]` to rank i and fill `buffers[i]` from it. Empty parts send no message."""
        receives = [
            (buffer, peer)
            for index, (peer, buffer) in enumerate(zip(self._ranks, buffers, strict=True))
            if index != self._group_rank and buffer.numel()
        ]
        size = len(self._ranks)
        # Each rank begins with its neighbor: if all began with rank 0, its link would be the bottleneck of the start.
        order = [(self._group_rank + step) % size for step in range(1, size)]
        sends = [(parts[index], self._ranks[index]) for index in order if parts[index].numel()]
        buffers[self._group_rank].copy_(parts[self._group_rank])
        self.send_and_receive(sends, receives)


# torch 2.13 renames both, and warns from every rank where the former names are used.
_reduce_scatter: Callable[..., object] = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
_all_gather: Callable[..., object] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
