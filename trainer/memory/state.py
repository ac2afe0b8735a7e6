"""Bytes that a rank holds from step to step: weights, gradients, masters, moments and weight average."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with the same dtypes and the same sharding."""

    elements: float
    zero_ranks: int
    """Ranks over which masters and moments are sharded (ZeRO-1)."""
    weight_bytes: int
    """Bytes per weight in the compute dtype."""
    master_bytes: int = 4
    """Bytes per gradient, and per master weight."""
    moment_bytes: int = 2
    """Bytes of each of the two moments per parameter."""
    has_ema: bool = False
    """True if the weight average lies in this memory; on GPU ranks it lies in host memory."""


@dataclass(frozen=True)
class StateBytes:
    """Bytes of model and optimizer state of one rank."""

    weights: float
    fp8_weights: float
    """FP8 copies that a step makes for all its micro-batches: one for the forward and a transposed one."""
    gradients: float
    masters: float
    moments: float
    average: float

    @staticmethod
    def from_groups(portions: Iterable[ParameterGroup], fp8_weights: float = 0.0) -> "StateBytes":
        """Sum the bytes of `portions`: 6 + 8/d per parameter with BF16 weights and moments and d = `zero_ranks`."""
        # BF16: 2 for the weight and 4 for the FP32 gradient on every rank; 4 for the master and 2 + 2 for the moments,
        # sharded. A weight as wide as its master is the master, and counts once.
        portions = list(portions)
        return StateBytes(
            weights=sum(p.elements * p.weight_bytes for p in portions),
            fp8_weights=fp8_weights,
            gradients=sum(p.elements * p.master_bytes for p in portions),
            masters=sum(
                p.elements / p.zero_ranks * p.master_bytes for p in portions if p.weight_bytes < p.master_bytes
            ),
            moments=sum(p.elements / p.zero_ranks * 2 * p.moment_bytes for p in portions),
            average=sum(p.elements / p.zero_ranks * p.master_bytes for p in portions if p.has_ema),
        )

    @property
    def total(self) -> float:
        """Bytes of all state."""
        return self.weights + self.fp8_weights + self.gradients + self.masters + self.moments + self.average
