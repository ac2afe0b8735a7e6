"""What a rehearsal finds wrong, whichever check has found it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from .log import RankFinding, RankLog

ERROR_KIND = "error"
"""Kind of the fault of a rank whose step raised: its log ends there."""


@dataclass(frozen=True)
class RunFinding:
    """A reason for which the run must not be started as it is."""

    kind: str
    """`hang`, `first contact`, `collective`, `message`, `host read`, `control`, `world`, `groups`, `memory`, or the
    kind of a rank's own finding."""
    ranks: tuple[int, ...]
    text: str
    places: tuple[str, ...] = ()
    """Of each of `ranks`, or one that they share: the instruction and the line of our code."""

    def __str__(self) -> str:
        is_told = not self.places or "\n" in self.text  # a text of several lines has the places where they belong
        where = "" if is_told else f" [{'; '.join(dict.fromkeys(self.places))}]"
        return f"{self.kind}, {format_ranks(self.ranks)}: {self.text}{where}"


def group_findings(findings: Mapping[int, Sequence[RankFinding]]) -> Iterator[RunFinding]:
    """Return the findings of single ranks, one fault for all that say the same of one line of code.

    The instructions in which it happens differ: the first is named, and they are counted.
    """
    alike: dict[tuple[str, str, str], list[tuple[int, str]]] = {}
    for rank, found in findings.items():
        for finding in dict.fromkeys(found):
            key = finding.kind, finding.text, code_line(finding.code_location)
            alike.setdefault(key, []).append((rank, finding.code_location))
    for (kind, text, _), of in alike.items():
        ranks = tuple(dict.fromkeys(rank for rank, _ in of))
        often = f"; {len(of)} times" if len(of) > len(ranks) else ""
        yield RunFinding(kind, ranks, f"{text}{often}", (of[0][1],))


def code_line(place: str) -> str:
    """Return the line of our code without the instruction that a place begins with."""
    return place.rpartition(": ")[2]


def has_raised(log: RankLog) -> bool:
    """Return whether the rank's step raised, so that what it would have done later is not known."""
    return any(finding.kind == ERROR_KIND for finding in log.findings)


def format_ranks(ranks: Sequence[int]) -> str:
    """Return the ranks as errors name them, a long list by its ends."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) <= 4:
        return f"ranks {', '.join(map(str, ranks))}"
    return f"{len(ranks)} ranks from {ranks[0]} to {ranks[-1]}"
