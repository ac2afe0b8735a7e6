"""Comparison of all rehearsed ranks' logs: equal collectives in equal order, and matching P2P messages."""

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise, zip_longest

from .deadlock.communicators import (
    CollectivesByCommunicator,
    Communicator,
    P2POpEndpoint,
    group_collectives,
    group_p2p_ops,
)
from .findings import RunFinding, has_raised
from .log import CollectiveRecord, P2POpRecord, RankLog

ALL_TO_ALL = "all_to_all"


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
        texts = {rank: [_collective_text(each) for each in row] for rank, row in rows.items()}
        for ours, theirs in pairwise(sorted(rows)):
            differing = _differing_numbers((texts[ours], texts[theirs]), (ours, theirs), failed)
            if differing:
                first = differing[0]
                has = "; ".join(
                    f"rank {rank} has {_text_at(texts[rank], first, f'none (its last is number {len(texts[rank])})')}"
                    for rank in (ours, theirs)
                )
                text = f"number {first + 1} on {communicator}: {has}"
                yield _finding("collective", (ours, theirs), (rows[ours], rows[theirs]), differing, text)


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
                yield _finding("collective", (ours, theirs), (rows[ours], rows[theirs]), differing, text)


def _between(
    communicator: Communicator, left: CollectiveRecord, ours: int, right: CollectiveRecord, theirs: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the rows sent and expected, from the first to the second rank and in the other direction."""
    here, there = communicator.ranks.index(ours), communicator.ranks.index(theirs)
    return (left.sends[there], right.receives[here]), (right.sends[here], left.receives[there])


def _message_findings(logs: Sequence[RankLog], failed: set[int]) -> Iterator[RunFinding]:
    # Messages between two ranks of a communicator have no tags: they match by their number.
    sent, received = group_p2p_ops(logs)
    for channel in dict.fromkeys((*sent, *received)):
        communicator, source, target = channel
        ends = sent.get(channel, []), received.get(channel, [])
        out, arriving = ([_message_text(end.message) for end in row] for row in ends)
        differing = _differing_numbers((out, arriving), (source, target), failed)
        if differing:
            first = differing[0]
            text = (
                f"message {first + 1} from rank {source} to rank {target} on {communicator}: rank {source} sends"
                f" {_text_at(out, first, 'none')}; rank {target} receives {_text_at(arriving, first, 'none')}"
            )
            yield _finding("message", (source, target), ends, differing, text)


def _collective_text(each: CollectiveRecord) -> str:
    return f"{each.operation} ({each.purpose}) of {each.dtype} {list(each.shape)}"


def _message_text(message: P2POpRecord) -> str:
    return f"{message.purpose}, {message.dtype} {list(message.shape)}"


def _text_at(texts: Sequence[str], number: int, missing: str) -> str:
    return texts[number] if number < len(texts) else missing


def _differing_numbers(
    texts: tuple[Sequence[str], Sequence[str]], ranks: tuple[int, int], failed: set[int]
) -> list[int]:
    """Return the numbers at which the calls of two ranks have different texts, which hold all that must be equal."""
    shorter = ranks[0] if len(texts[0]) < len(texts[1]) else ranks[1]
    pairs = zip(*texts, strict=False) if shorter in failed else zip_longest(*texts)
    return [number for number, (ours, theirs) in enumerate(pairs) if ours != theirs]


def _finding(
    kind: str,
    ranks: tuple[int, int],
    rows: Sequence[Sequence[CollectiveRecord] | Sequence[P2POpEndpoint]],
    differing: Sequence[int],
    text: str,
) -> RunFinding:
    """Return the finding for the first of the differing numbers, with a count of the others."""
    places = tuple(row[differing[0]].code_location for row in rows if differing[0] < len(row))
    others = f"; {len(differing) - 1} more after it" if len(differing) > 1 else ""
    return RunFinding(kind, ranks, f"{text}{others}", places)
