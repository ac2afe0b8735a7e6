"""Findings of a rehearsal, from all of its checks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from .log import RankFinding, RankLog

ERROR_KIND = "error"
"""Kind of the finding of a rank whose step raised; its log ends there."""


@dataclass(frozen=True)
class RunFinding:
    """Reason why the run must not be started unchanged."""

    kind: str
    """`hang`, `first contact`, `collective`, `message`, `host read`, `control`, `world`, `groups`, `memory`, or the
    kind of a rank's own finding."""
    ranks: tuple[int, ...]
    text: str
    code_locations: tuple[str, ...] = ()
    """Instruction and code line of each of `ranks`, or one that they share."""

    def __str__(self) -> str:
        is_complete = not self.code_locations or "\n" in self.text  # a text of several lines contains the places
        locations = "" if is_complete else f" [{'; '.join(dict.fromkeys(self.code_locations))}]"
        return f"{self.kind}, {format_ranks(self.ranks)}: {self.text}{locations}"


def group_findings(findings: Mapping[int, Sequence[RankFinding]]) -> Iterator[RunFinding]:
    """Merge the findings of single ranks that have the same text and code line.

    Their instructions may differ: the merged finding names the first and counts them.
    """
    alike: dict[tuple[str, str, str], list[tuple[int, str]]] = {}
    for rank, found in findings.items():
        for finding in dict.fromkeys(found):
            key = finding.kind, finding.text, code_line_of_location(finding.code_location)
            alike.setdefault(key, []).append((rank, finding.code_location))
    for (kind, text, _), occurrences in alike.items():
        ranks = tuple(dict.fromkeys(rank for rank, _ in occurrences))
        count = f"; {len(occurrences)} times" if len(occurrences) > len(ranks) else ""
        yield RunFinding(kind, ranks, f"{text}{count}", (occurrences[0][1],))


def code_line_of_location(place: str) -> str:
    """Return the code line of a code location, without its instruction."""
    return place.rpartition(": ")[2]


def has_raised(log: RankLog) -> bool:
    """Return whether the rank's step raised, so that its log is incomplete."""
    return any(finding.kind == ERROR_KIND for finding in log.findings)


def format_ranks(ranks: Sequence[int]) -> str:
    """Return the ranks as text for messages; a long list is abbreviated to its ends."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) <= 4:
        return f"ranks {', '.join(map(str, ranks))}"
    return f"{len(ranks)} ranks from {ranks[0]} to {ranks[-1]}"
