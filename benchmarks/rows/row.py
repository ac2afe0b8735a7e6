"""A row of benchmarks/bring_up.py: one check that runs on every rank, and its outcome."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch

from shoestring.comm.groups import Group

Figures = Mapping[str, float | str]
"""Figures of a row by name; a name ends with its unit."""


class RowStatus(StrEnum):
    WORKS = "works"
    NOT_HERE = "not here"
    FAILS = "fails"


class NotHere(Exception):  # noqa: N818 -- named after the outcome
    """Raised if this machine lacks what the row needs; the message names it."""


class Wrong(Exception):  # noqa: N818 -- named after the outcome
    """Raised if the result is wrong; the message holds both numbers."""


@dataclass(frozen=True)
class Machine:
    """Device and groups of a rank. Without torchrun every group is only this rank."""

    device: torch.device
    world: Group
    node: Group
    """Ranks of this rank's node."""
    rail: Group
    """Ranks with the same local index on all nodes."""

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def need_gpu(self, capability: tuple[int, int] = (0, 0)) -> None:
        """Raise `NotHere` without a GPU of at least this compute capability."""
        if not self.on_gpu:
            raise NotHere("torch sees no GPU")
        found = torch.cuda.get_device_capability(self.device)
        if found < capability:
            raise NotHere(f"the GPU has compute capability {found[0]}.{found[1]}, not {capability[0]}.{capability[1]}")

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object], repeats: int = 5) -> float:
        """Return the median wall time of `work`, after two warm-up runs."""
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
    """Row before it runs."""

    name: str
    run: Callable[[Machine], Figures]
    mandatory: bool
    """True if its failure fails the script; `not here` never does."""
    seconds: float = 60.0
    """Time limit; a rank that exceeds it is killed, and the row fails."""


@dataclass(frozen=True)
class RankResult:
    """Result of a row on one rank."""

    status: RowStatus
    reason: str
    figures: Figures | None


@dataclass(frozen=True)
class Outcome:
    """Result of a row over all ranks."""

    name: str
    status: RowStatus
    mandatory: bool
    reason: str
    figures: tuple[Figures, ...]
    """Figures of each rank that has some, in the order of ranks."""

    def line(self) -> str:
        """Return one line of the table, with a range for figures that differ between ranks."""
        return f"{self.status:9} {self.name:34} {self.reason or ', '.join(self._ranges())}"

    def _ranges(self) -> list[str]:
        return [f"{name} {_range([each[name] for each in self.figures])}" for name in self.figures[0]]


def run_check(check: Check, machine: Machine) -> RankResult:
    """Run `check` on this rank; return the result."""
    try:
        return RankResult(RowStatus.WORKS, "", check.run(machine))
    except NotHere as error:
        return RankResult(RowStatus.NOT_HERE, str(error), None)
    except Exception as error:  # any exception of a package or driver is the result, and the next row runs
        return RankResult(RowStatus.FAILS, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", None)


def outcome_of(check: Check, of_ranks: Sequence[RankResult]) -> Outcome:
    """Merge the results of all ranks: the worst rank decides."""
    order = (RowStatus.WORKS, RowStatus.NOT_HERE, RowStatus.FAILS)
    worst = max((each.status for each in of_ranks), key=order.index)
    measured = tuple(each.figures for each in of_ranks if each.figures is not None)
    return Outcome(check.name, worst, check.mandatory, _reasons([each.reason for each in of_ranks]), measured)


def _reasons(of_ranks: Sequence[str]) -> str:
    """Join the distinct reasons, each with the first rank that gave it unless all are equal."""
    if len(set(of_ranks)) == 1:
        return of_ranks[0]
    return "; ".join(f"rank {of_ranks.index(reason)}: {reason}" for reason in dict.fromkeys(of_ranks) if reason)


def relative_error(result: torch.Tensor, truth: torch.Tensor) -> float:
    """Return ‖result - truth‖ / ‖truth‖ in FP64."""
    result, truth = result.double(), truth.double()
    return float(((result - truth).norm() / truth.norm()).item())


def expect(name: str, error: float, limit: float) -> float:
    """Return `error`; raise `Wrong` if it is over `limit` or NaN."""
    if not error <= limit:
        raise Wrong(f"the error of {name} is {error:.3g}, more than {limit:g}")
    return error


def _range(values: list[float | str]) -> str:
    texts = list(dict.fromkeys(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values))
    numbers = [float(value) for value in values if not isinstance(value, str)]
    if len(texts) > 1 and len(numbers) == len(values):
        return f"{min(numbers):.4g} to {max(numbers):.4g}"
    return " | ".join(texts)
