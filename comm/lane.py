"""Messages between pipeline neighbours in one direction: a queue of batches, each of sends and receives together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.distributed as dist
from torch import Tensor

from .failure import failing_clearly
from .groups import Group
from .pending import Pending, Worker


class Lane:
    """One direction, over a group of its own: neighbours send to each other at the same moment.

    Batches run in the order in which they are posted. A batch holds on to what it sends until that has been sent, and
    to nothing longer.
    """

    def __init__(self, group: Group, worker: Worker) -> None:
        self._group = group
        self._worker = worker

    def post(
        self, what: str, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Callable[[], Tensor], int]]
    ) -> Pending[tuple[Tensor, ...]]:
        """Send each tensor to a rank, and receive one from a rank into what the function makes; those are returned.

        Between two ranks messages arrive in the order in which they are sent; both ends must list them in that order.
        `what` names the batch in the error of one that fails.
        """
        tensors = tuple(tensor for tensor, _ in sends)
        peers = [peer for _, peer in (*sends, *receives)]
        group = self._group

        def move() -> tuple[Tensor, ...]:
            buffers = tuple(make() for make, _ in receives)
            on_gpu = any(tensor.is_cuda for tensor in (*tensors, *buffers))
            outgoing = [dist.P2POp(dist.isend, tensor, peer, group.handle) for tensor, peer in sends]
            incoming = [
                dist.P2POp(dist.irecv, buffer, peer, group.handle)
                for buffer, (_, peer) in zip(buffers, receives, strict=True)
            ]
            with failing_clearly(group.rank, what, peers, group.limit):
                for work in dist.batch_isend_irecv([*outgoing, *incoming]):
                    # NCCL with a limit would keep this thread until the neighbour has sent; its stream waits instead.
                    work.wait(*(() if on_gpu else (group.limit,)))
            return buffers

        return self._worker.submit(what, move, tensors)

    def close(self) -> None:
        """End what runs the batches."""
        self._worker.close()
