"""What a rehearsal finds wrong, whichever check has found it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .log import Finding, RankLog

ERROR = "error"
"""Kind of the fault of a rank whose step raised: its log ends there."""


@dataclass(frozen=True)
class Fault:
    """A reason for which the run must not be started as it is."""

    kind: str
    """`hang`, `first contact`, `collective`, `message`, `host read`, `control`, `world`, `groups`, `memory`, or the
    kind of a rank's own finding."""
    ranks: tuple[int, ...]
    text: str
    places: tuple[str, ...] = ()
    """Of each of `ranks`, or one that they share: the instruction and the line of our code."""

    def __str__(self) -> str:
        where = f" [{'; '.join(self.places)}]" if self.places else ""
        return f"{self.kind}, {ranks_text(self.ranks)}: {self.text}{where}"


def own_faults(logs: Sequence[RankLog]) -> Iterator[Fault]:
    """Return what single ranks show; what several show alike is one fault of them all."""
    ranks: dict[Finding, list[int]] = {}
    for log in logs:
        for finding in dict.fromkeys(log.findings):
            ranks.setdefault(finding, []).append(log.rank)
    for finding, of in ranks.items():
        yield Fault(finding.kind, tuple(of), finding.text, (finding.place,))


def ends_early(log: RankLog) -> bool:
    """Return whether the rank's step raised, so that what it would have done later is not known."""
    return any(finding.kind == ERROR for finding in log.findings)


def ranks_text(ranks: Sequence[int]) -> str:
    """Return the ranks as errors name them, a long list by its ends."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) <= 4:
        return f"ranks {', '.join(map(str, ranks))}"
    return f"{len(ranks)} ranks from {ranks[0]} to {ranks[-1]}"
