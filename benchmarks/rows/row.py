"""A row of benchmarks/bring_up.py: one thing tried on every rank, and what came of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch

from shoestring.comm.groups import Group

Figures = Mapping[str, float | str]
"""What a row measured. A name ends with its unit."""


class Verdict(StrEnum):
    WORKS = "works"
    NOT_HERE = "not here"
    FAILS = "fails"


class NotHere(Exception):  # noqa: N818 -- reads as the verdict it is
    """This machine has nothing to try this on; the message says what is missing."""


class Wrong(Exception):  # noqa: N818 -- reads as the verdict it is
    """It ran, and the result is wrong; the message holds both numbers."""


@dataclass(frozen=True)
class Machine:
    """Where a rank runs. Without torchrun every group is this rank alone."""

    device: torch.device
    world: Group
    node: Group
    """The ranks of this rank's node."""
    rail: Group
    """The ranks with its local index on all nodes."""

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def need_gpu(self, capability: tuple[int, int] = (0, 0)) -> None:
        """Raise `NotHere` where there is no GPU of at least this compute capability."""
        if not self.on_gpu:
            raise NotHere("torch sees no GPU")
        found = torch.cuda.get_device_capability(self.device)
        if found < capability:
            raise NotHere(f"the GPU has compute capability {found[0]}.{found[1]}, not {capability[0]}.{capability[1]}")

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object], repeats: int = 5) -> float:
        """Median wall-clock time of `work`, which has run twice before."""
        for _ in range(2):
            work()
        times = []
        for _ in range(repeats):
            self.synchronize()
            start = time.perf_counter()
            work()
            self.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times)


@dataclass(frozen=True)
class Check:
    """A row before it ran."""

    name: str
    run: Callable[[Machine], Figures]
    mandatory: bool
    """Whether its failure fails the script. What is not here never does."""
    seconds: float = 60.0
    """How long it may take. A rank that takes longer is killed, and the row fails."""


@dataclass(frozen=True)
class Attempt:
    """A row after it ran on one rank."""

    verdict: Verdict
    reason: str
    figures: Figures | None


@dataclass(frozen=True)
class Outcome:
    """A row after it ran, on all ranks together."""

    name: str
    verdict: Verdict
    mandatory: bool
    reason: str
    figures: tuple[Figures, ...]
    """Of each rank that got some, in the order of ranks."""

    def line(self) -> str:
        """One line of the table; a range where ranks differ."""
        return f"{self.verdict:9} {self.name:34} {self.reason or ', '.join(self._ranges())}"

    def _ranges(self) -> list[str]:
        return [f"{name} {_range([each[name] for each in self.figures])}" for name in self.figures[0]]


def attempt(check: Check, machine: Machine) -> Attempt:
    """Run `check` on this rank."""
    try:
        return Attempt(Verdict.WORKS, "", check.run(machine))
    except NotHere as error:
        return Attempt(Verdict.NOT_HERE, str(error), None)
    except Exception as error:  # whatever a provider or a driver raises is the finding, and the next row is tried
        return Attempt(Verdict.FAILS, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", None)


def outcome_of(check: Check, of_ranks: Sequence[Attempt]) -> Outcome:
    """What all ranks together say of a row: the worst rank decides."""
    order = (Verdict.WORKS, Verdict.NOT_HERE, Verdict.FAILS)
    worst = max((each.verdict for each in of_ranks), key=order.index)
    measured = tuple(each.figures for each in of_ranks if each.figures is not None)
    return Outcome(check.name, worst, check.mandatory, _reasons([each.reason for each in of_ranks]), measured)


def _reasons(of_ranks: Sequence[str]) -> str:
    """Each reason once, with the first rank that gave it unless all gave the same."""
    if len(set(of_ranks)) == 1:
        return of_ranks[0]
    return "; ".join(f"rank {of_ranks.index(reason)}: {reason}" for reason in dict.fromkeys(of_ranks) if reason)


def relative_error(result: torch.Tensor, truth: torch.Tensor) -> float:
    """‖result - truth‖ / ‖truth‖, in FP64."""
    result, truth = result.double(), truth.double()
    return float(((result - truth).norm() / truth.norm()).item())


def expect(name: str, error: float, limit: float) -> float:
    """Return `error`; raise `Wrong` where it is over `limit` or not a number."""
    if not error <= limit:
        raise Wrong(f"{name} is off by {error:.3g}, more than {limit:g}")
    return error


def _range(values: list[float | str]) -> str:
    texts = list(dict.fromkeys(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values))
    numbers = [float(value) for value in values if not isinstance(value, str)]
    if len(texts) > 1 and len(numbers) == len(values):
        return f"{min(numbers):.4g} to {max(numbers):.4g}"
    return " | ".join(texts)
