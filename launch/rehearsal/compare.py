"""Comparison of all rehearsed ranks' logs: equal collectives in equal order, and matching P2P messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

from .deadlock.communicators import (
    CollectivesByCommunicator,
    Communicator,
    P2POpEndpoint,
    group_collectives,
    group_p2p_ops,
)
from .findings import RunFinding, has_raised
from .log import CollectiveRecord, RankLog

ALL_TO_ALL = "all_to_all"

_Row = list[CollectiveRecord]


def compare_rank_logs(logs: Sequence[RankLog]) -> Iterator[RunFinding]:
    """Yield every mismatch between two rehearsed ranks.

    For two ranks on one communicator the first mismatch is described and later ones are counted: after a missing call
    all others differ. A log that ends with an exception is compared up to its end.
    """
    failed = {log.rank for log in logs if has_raised(log)}
    collectives = group_collectives(logs)
    yield from _order_findings(collectives, failed)
    yield from _size_findings(collectives)
    yield from _message_findings(logs, failed)


def _order_findings(collectives: CollectivesByCommunicator, failed: set[int]) -> Iterator[RunFinding]:
    # Operation, shape, dtype and purpose are equal for all members, so comparing each member with the next suffices.
    for communicator, rows in collectives.items():
        for ours, theirs in pairwise(sorted(rows)):
            differing = [
                number
                for number in range(max(len(rows[ours]), len(rows[theirs])))
                if not _is_alike(rows, ours, theirs, number, failed)
            ]
            if differing:
                yield _order_finding(communicator, rows, (ours, theirs), differing)


def _is_alike(rows: dict[int, _Row], ours: int, theirs: int, number: int, failed: set[int]) -> bool:
    present = [rank for rank in (ours, theirs) if number < len(rows[rank])]
    if len(present) == 2:
        return _comparable_fields(rows[ours][number]) == _comparable_fields(rows[theirs][number])
    return bool({ours, theirs}.difference(present) & failed)


def _comparable_fields(collective: CollectiveRecord) -> tuple[object, ...]:
    return collective.operation, collective.purpose, collective.shape, collective.dtype


def _order_finding(
    communicator: Communicator, rows: dict[int, _Row], ranks: tuple[int, int], differing: list[int]
) -> RunFinding:
    first = differing[0]
    has = "; ".join(f"rank {rank} has {_collective_at(rows[rank], first)}" for rank in ranks)
    places = tuple(rows[rank][first].code_location for rank in ranks if first < len(rows[rank]))
    text = f"number {first + 1} on {communicator}: {has}{_count_of_others(differing)}"
    return RunFinding("collective", ranks, text, places)


def _collective_at(row: _Row, number: int) -> str:
    if number >= len(row):
        return f"none (its last is number {len(row)})"
    each = row[number]
    return f"{each.operation} ({each.purpose}) of {each.dtype} {list(each.shape)}"


def _count_of_others(differing: Sequence[int]) -> str:
    return f"; {len(differing) - 1} more after it" if len(differing) > 1 else ""


def _size_findings(collectives: CollectivesByCommunicator) -> Iterator[RunFinding]:
    """Yield a finding per pair of members that disagree on the rows of an all-to-all."""
    for communicator, rows in collectives.items():
        for ours, theirs in combinations(sorted(rows), 2):
            differing = [
                number
                for number, (left, right) in enumerate(zip(rows[ours], rows[theirs], strict=False))
                if left.operation == right.operation == ALL_TO_ALL
                and any(sent != received for sent, received in _between(communicator, left, ours, right, theirs))
            ]
            if differing:
                first = differing[0]
                left, right = rows[ours][first], rows[theirs][first]
                (out, received), (sent, back) = _between(communicator, left, ours, right, theirs)
                text = (
                    f"number {first + 1} on {communicator}, {left.purpose}:"
                    f" rank {ours} sends {out} rows to rank {theirs}, which expects {received};"
                    f" rank {theirs} sends {sent} rows to rank {ours}, which expects {back}"
                )
                places = left.code_location, right.code_location
                yield RunFinding("collective", (ours, theirs), f"{text}{_count_of_others(differing)}", places)


def _between(
    communicator: Communicator, left: CollectiveRecord, ours: int, right: CollectiveRecord, theirs: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the rows sent and expected, from the first to the second rank and in the other direction."""
    here, there = communicator.ranks.index(ours), communicator.ranks.index(theirs)
    return (left.sends[there], right.receives[here]), (right.sends[here], left.receives[there])


def _message_findings(logs: Sequence[RankLog], failed: set[int]) -> Iterator[RunFinding]:
    # Messages between two ranks of a communicator have no tags: they match by their number.
    sent, received = group_p2p_ops(logs)
    for key in dict.fromkeys((*sent, *received)):
        communicator, source, target = key
        out, arriving = sent.get(key, []), received.get(key, [])
        shorter = source if len(out) < len(arriving) else target
        compared = min(len(out), len(arriving)) if shorter in failed else max(len(out), len(arriving))
        differing = [number for number in range(compared) if not _is_matched(out, arriving, number)]
        if differing:
            first = differing[0]
            text = (
                f"message {first + 1} from rank {source} to rank {target} on {communicator}: rank {source} sends"
                f" {_message_at(out, first)}; rank {target} receives {_message_at(arriving, first)}"
            )
            places = tuple(ends[first].code_location for ends in (out, arriving) if first < len(ends))
            yield RunFinding("message", (source, target), f"{text}{_count_of_others(differing)}", places)


def _is_matched(out: Sequence[P2POpEndpoint], arriving: Sequence[P2POpEndpoint], number: int) -> bool:
    if number >= min(len(out), len(arriving)):
        return False
    left, right = out[number].message, arriving[number].message
    return (left.purpose, left.shape, left.dtype) == (right.purpose, right.shape, right.dtype)


def _message_at(ends: Sequence[P2POpEndpoint], number: int) -> str:
    if number >= len(ends):
        return "none"
    message = ends[number].message
    return f"{message.purpose}, {message.dtype} {list(message.shape)}"
