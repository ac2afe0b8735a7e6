"""Bytes of what a rank holds from step to step: weights, gradients, masters, moments, and their average."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are kept alike."""

    elements: float
    zero_ranks: int
    """Ranks that share their masters and moments (ZeRO-1)."""
    weight_bytes: int
    """Bytes of one of them as it is computed with."""
    master_bytes: int = 4
    """Of its gradient and master."""
    moment_bytes: int = 2
    """Of each of its two moments."""
    has_ema: bool = False
    """Whether their average is kept in this memory: beside a GPU it lies in the host's."""


@dataclass(frozen=True)
class StateBytes:
    """Bytes of one rank."""

    weights: float
    fp8_weights: float
    """Copies that a step makes for all its micro-batches, one for each direction."""
    gradients: float
    masters: float
    moments: float
    average: float

    @staticmethod
    def from_groups(portions: Iterable[ParameterGroup], fp8_weights: float = 0.0) -> StateBytes:
        """6 + 8/d a parameter with BF16 weights and moments; a master is the weight itself where that is as wide."""
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
        """All of it."""
        parts: list[float] = list(vars(self).values())
        return sum(parts)
