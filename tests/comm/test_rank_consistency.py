"""Processes that differ are refused together, with the first difference."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from shoestring.comm.rank_consistency import (
    Fingerprint,
    Fingerprints,
    RankMismatchError,
    find_first_mismatch,
    fingerprints_from_json,
    fingerprints_to_json,
    verify_ranks_match,
)


def facts(**values: str) -> dict[str, Fingerprint]:
    return {name: Fingerprint(f"hash of {value}", value) for name, value in values.items()}


def compare(all_facts: Sequence[Fingerprints]) -> list[str]:
    """Return each rank's refusal; empty where it was accepted."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=20))

    def rank(number: int) -> str:
        try:
            verify_ranks_match(store, number, len(all_facts), all_facts[number])
        except RankMismatchError as different:
            return str(different)
        return ""

    with ThreadPoolExecutor(len(all_facts)) as threads:
        return list(threads.map(rank, range(len(all_facts))))


def test_ranks_that_are_the_same_continue() -> None:
    assert compare([facts(seed="1", code="a")] * 3) == ["", "", ""]
    assert compare([facts(seed="1")]) == [""]


@pytest.mark.parametrize("position", [0, 1, 2])
def test_one_that_differs_is_named_on_all_of_them(position: int) -> None:
    ranks = [facts(seed="1", rate="2", code="a") for _ in range(3)]
    ranks[position] = facts(seed="1", rate="3", code="b")
    refused = compare(ranks)
    assert all("rate = '" in words and "must be the same on all ranks" in words for words in refused)
    odd = "rank 0" if position == 0 else f"rank {position}"
    assert all(f"3 on {odd} (" in words for words in refused)


@pytest.mark.parametrize(
    ("here", "there", "name"),
    [
        (facts(a="1", b="2"), facts(b="2", a="1"), None),
        (facts(a="1", b="2"), facts(a="1"), "b"),
        (facts(a="1"), facts(a="1", b="2"), "b"),
        (facts(a="1", b="2", c="3"), facts(a="1", b="9", c="9"), "b"),
        ({}, facts(a="1"), "a"),
    ],
)
def test_the_first_difference(here: Fingerprints, there: Fingerprints, name: str | None) -> None:
    assert find_first_mismatch(here, there) == name


def test_equal_digests_are_equal_whatever_is_shown() -> None:
    assert find_first_mismatch({"a": Fingerprint("x", "shown so")}, {"a": Fingerprint("x", "or so")}) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ("\0", "Expecting value"),
        ("[]", "must be a mapping of keys"),
        ('{"a": "b"}', "a is not a fingerprint"),
        ('{"a": ["b"]}', "a is not a fingerprint"),
        ('{"a": [1, 2]}', "a is not a fingerprint"),
        ('{"a": ["b", null]}', "a is not a fingerprint"),
    ],
)
def test_junk_is_no_facts(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        fingerprints_from_json(text)


def test_facts_travel_as_text() -> None:
    make: Callable[[], Fingerprints] = lambda: facts(seed="1", text="ä\n")  # noqa: E731
    assert fingerprints_from_json(fingerprints_to_json(make())) == make()
