"""Bytes of what a rank holds from step to step: weights, gradients, masters, moments, and their average."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Portion:
    """Parameters that are kept alike."""

    elements: float
    copies: int
    """Ranks that share their masters and moments (ZeRO-1)."""
    weight: int
    """Bytes of one of them as it is computed with."""
    wide: int = 4
    """Of its gradient and master."""
    moment: int = 2
    """Of each of its two moments."""
    averaged: bool = False
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
    def of(portions: Iterable[Portion], fp8_weights: float = 0.0) -> StateBytes:
        """6 + 8/d a parameter with BF16 weights and moments; a master is the weight itself where that is as wide."""
        portions = list(portions)
        return StateBytes(
            weights=sum(p.elements * p.weight for p in portions),
            fp8_weights=fp8_weights,
            gradients=sum(p.elements * p.wide for p in portions),
            masters=sum(p.elements / p.copies * p.wide for p in portions if p.weight < p.wide),
            moments=sum(p.elements / p.copies * 2 * p.moment for p in portions),
            average=sum(p.elements / p.copies * p.wide for p in portions if p.averaged),
        )

    @property
    def total(self) -> float:
        """All of it."""
        parts: list[float] = list(vars(self).values())
        return sum(parts)
