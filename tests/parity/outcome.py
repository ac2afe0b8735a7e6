"""The results of a run, and the differences between two runs."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key")


@dataclass(frozen=True)
class StepOutcome:
    """One optimizer step. `total` is main + weighted MTP + balance; every loss is of the whole global batch."""

    total: float
    main: float
    mtp: float
    """Weighted by λ."""
    balance: float
    """Weighted by α."""
    norm: float
    """Gradient norm before clipping."""
    gradients: dict[str, Tensor]
    """Gradients before clipping, by released name. A rank has those of its own experts only."""
    counts_E: dict[int, Tensor]
    """Load by released layer number, int64."""


@dataclass(frozen=True)
class Outcome:
    """Several steps, and the parameters after the last one, by released name."""

    steps: tuple[StepOutcome, ...]
    weights: dict[str, Tensor]
    biases: dict[str, Tensor]


@dataclass(frozen=True)
class Errors:
    """Largest differences over all steps, ranks and parameters: relative, except `bias` and `counts`."""

    total: float
    main: float
    mtp: float
    balance: float
    grad: float
    norm: float
    weights: float
    bias: float
    """Absolute; must be 0."""
    counts: float
    """Tokens; must be 0."""

    def over(self, tolerance: float) -> set[str]:
        """Return the names of the quantities that are wrong. NaN is wrong."""
        exact = {"bias", "counts"}
        limits = {field.name: 0.0 if field.name in exact else tolerance for field in fields(self)}
        return {name for name, limit in limits.items() if not vars(self)[name] <= limit}

    def line(self) -> str:
        """Return all quantities in one line."""
        loss = worst((self.total, self.main, self.mtp, self.balance))
        floats = f"loss {loss:.1e}  grad {self.grad:.1e}  norm {self.norm:.1e}  weights {self.weights:.1e}"
        bias = "exact" if self.bias == 0 else f"off by {self.bias:.2g}"
        counts = "exact" if self.counts == 0 else f"off by {self.counts:g} tokens"
        return f"{floats}  bias {bias}  counts {counts}"


def compare(ranks: Sequence[Outcome], reference: Outcome) -> Errors:
    """Compare every rank of a layout with the reference. Together the ranks must hold every parameter."""
    for kind in ("weights", "biases"):
        held = {name for rank in ranks for name in vars(rank)[kind]}
        assert held == vars(reference)[kind].keys()
    steps = [pair for rank in ranks for pair in zip(rank.steps, reference.steps, strict=True)]
    for ours, theirs in steps:
        assert ours.counts_E.keys() == theirs.counts_E.keys()
    for rank in ranks:
        assert all(step.gradients.keys() == rank.weights.keys() for step in rank.steps)
    return Errors(
        total=worst(_scalar_error(ours.total, theirs.total) for ours, theirs in steps),
        main=worst(_scalar_error(ours.main, theirs.main) for ours, theirs in steps),
        mtp=worst(_scalar_error(ours.mtp, theirs.mtp) for ours, theirs in steps),
        balance=worst(_scalar_error(ours.balance, theirs.balance) for ours, theirs in steps),
        grad=worst(_relative_error(ours.gradients, theirs.gradients) for ours, theirs in steps),
        norm=worst(_scalar_error(ours.norm, theirs.norm) for ours, theirs in steps),
        weights=worst(_relative_error(rank.weights, reference.weights) for rank in ranks),
        bias=worst(_largest_difference(rank.biases, reference.biases) for rank in ranks),
        counts=worst(_largest_difference(ours.counts_E, theirs.counts_E) for ours, theirs in steps),
    )


def worst(errors: Iterable[float]) -> float:
    """Return the largest error; NaN is larger than any number (`max` would skip it)."""
    return max((math.inf if math.isnan(error) else error for error in errors), default=0.0)


def _scalar_error(ours: float, theirs: float) -> float:
    return abs(ours - theirs) / (abs(theirs) or 1.0)


def _relative_error(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Return the maximum over `ours` of ‖ours - theirs‖ / ‖theirs‖; ‖ours‖ where theirs is zero."""
    return worst(
        float((tensor.double() - theirs[name]).norm()) / (float(theirs[name].norm()) or 1.0)
        for name, tensor in ours.items()
    )


def _largest_difference(ours: Mapping[Key, Tensor], theirs: Mapping[Key, Tensor]) -> float:
    return worst(float((tensor - theirs[key]).abs().max()) for key, tensor in ours.items())


def results(outcome: Outcome) -> dict[str, torch.Tensor]:
    """Return every result of three steps by name."""
    kept = {**outcome.weights, **outcome.biases}
    for number, step in enumerate(outcome.steps):
        kept |= {f"{number} gradient {name}": grad for name, grad in step.gradients.items()}
        losses = (step.total, step.main, step.mtp, step.balance, step.norm)
        kept[f"{number} losses"] = torch.tensor(losses, dtype=torch.float64)
    return kept
