"""Values that the host reads from the fake device: sizes of balanced routing, and ones for everything else."""

import torch
from torch import Tensor

from ....trainer.config import RunConfig
from .routing import BalancedRouting
from .spans import RehearsalSpanRecorder


class BalancedReadback:
    """`DeviceReadback` of one rank, with the sizes of its token dispatcher."""

    def __init__(self, config: RunConfig, rank: int, spans: RehearsalSpanRecorder) -> None:
        routing, ep_rank = BalancedRouting.from_config(config), config.topology.ep_rank(rank)
        sizes = (
            routing.two_hop_exchange_sizes(ep_rank)
            if config.exchange.name == "two_hop"
            else routing.flat_exchange_sizes(ep_rank)
        )
        self._sizes = torch.tensor(sizes, dtype=torch.int64)
        self._spans = spans

    def read(self, tensor: Tensor) -> Tensor:
        """Return sizes inside a dispatch, and ones elsewhere: sums and norms are finite, so that no step is skipped."""
        if not self._spans.is_inside_dispatch:
            return torch.ones(tensor.shape, dtype=tensor.dtype)
        if tensor.shape != self._sizes.shape or tensor.dtype != torch.int64:
            found, known = f"{tensor.dtype} {list(tensor.shape)}", list(self._sizes.shape)
            raise NotImplementedError(
                f"{self._spans.innermost_span_name} reads {found}; the rehearsal only knows the sizes, int64 {known}"
            )
        return self._sizes.clone()
