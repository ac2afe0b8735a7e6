"""Mixtures: exact shares, every sample of a source once, and an order that depends on the number of the sample only."""

import random

import numpy as np
import pytest

from shoestring.trainer.data.mixture import BLOCK, SampleMixture

WEIGHTS = [{0: 0.7}, {0: 0.2}, {0: 0.1}]
CHANGING = [{0: 0.5, 10_000 * 64: 0.1}, {0: 0.5}, {0: 0.0, 3_000 * 64: 1.0}]


def mixture(weights: list[dict[int, float]] = WEIGHTS, seed: int = 0) -> SampleMixture:
    return SampleMixture.from_weights(seed, weights, 64)


def test_shares_are_exact_in_every_block() -> None:
    source_N, _ = mixture().assign(0, 10 * BLOCK)
    for block in range(1, 11):
        counts = np.bincount(source_N[: block * BLOCK], minlength=3)
        assert np.abs(counts - block * BLOCK * np.array([0.7, 0.2, 0.1])).max() <= 2
    assert len(set(source_N[:40].tolist())) == 3  # shuffled within the block


@pytest.mark.parametrize("weights", [WEIGHTS, CHANGING, [{0: 3.0}], [{0: 1e-9}, {0: 1.0}], [{0: 0.1}] * 64])
def test_the_samples_of_a_source_are_numbered_without_gaps(weights: list[dict[int, float]]) -> None:
    source_N, number_N = mixture(weights).assign(0, 5 * BLOCK)
    for source in range(len(weights)):
        numbers = np.sort(number_N[source_N == source])
        assert np.array_equal(numbers, np.arange(len(numbers)))


def test_any_range_is_a_piece_of_the_whole() -> None:
    whole, shuffle = mixture(CHANGING), random.Random(0)
    source_N, number_N = whole.assign(0, 5 * BLOCK)
    for _ in range(100):
        first = shuffle.randrange(5 * BLOCK)
        count = shuffle.randrange(5 * BLOCK - first + 1)
        found = mixture(CHANGING).assign(first, count)
        assert np.array_equal(found[0], source_N[first : first + count])
        assert np.array_equal(found[1], number_N[first : first + count])
        consumed = whole.consumed(first)
        assert consumed == tuple(np.bincount(source_N[:first], minlength=3).tolist())


def test_weights_change_at_their_number_of_tokens() -> None:
    source_N, _ = mixture(CHANGING).assign(0, 100_000)
    assert (source_N[:3000] != 2).all()
    third = np.bincount(source_N[3000:10_000], minlength=3) / 7000
    assert third == pytest.approx([0.25, 0.25, 0.5], abs=0.02)
    last = np.bincount(source_N[10_000:], minlength=3) / 90_000
    assert last == pytest.approx([0.1 / 1.6, 0.5 / 1.6, 1 / 1.6], abs=0.002)


def test_the_middle_of_a_long_run_is_found_at_once() -> None:
    first = 3_600_000_000
    source_N, number_N = mixture().assign(first, 100)
    assert number_N[source_N == 0][0] == pytest.approx(0.7 * first, abs=BLOCK)
    assert sum(mixture().consumed(first)) == first


def test_the_order_never_changes() -> None:
    """Checkpoints rely on it."""
    source_N, number_N = mixture(seed=7).assign(5000, 12)
    assert source_N.tolist() == [0, 0, 1, 2, 2, 0, 0, 0, 2, 2, 1, 0]
    assert number_N.tolist() == [3507, 3508, 983, 510, 511, 3509, 3510, 3511, 512, 513, 984, 3512]


def test_seeds_give_other_orders() -> None:
    assert not np.array_equal(mixture(seed=1).assign(0, 100)[0], mixture(seed=2).assign(0, 100)[0])
