"""The sizes of steps, against a plain walk through them."""

from itertools import pairwise, product

import pytest

from shoestring.trainer.run.batch_ramp import BatchRamp, make_batch_ramp


def walk(first: int, increment: int, last: int, tokens: int, length: int, steps: int) -> list[int]:
    """Return sizes by the definition: after c tokens, share number c // (tokens / shares) is in force."""
    sizes: list[int] = []
    shares = -(-(last - first) // increment)
    for _ in range(steps):
        number = sum(sizes) * length * shares // tokens
        sizes.append(last if number >= shares else first + number * increment)
    return sizes


@pytest.mark.parametrize(
    ("first", "increment", "last", "tokens"),
    [
        (4, 4, 16, 4000),
        (2, 3, 15, 1234),  # the last increment is smaller
        (8, 8, 64, 900),  # large steps jump over sizes
        (1, 1, 2, 7),
        (5, 100, 20, 333),
    ],
)
def test_sizes_are_those_of_a_walk(first: int, increment: int, last: int, tokens: int) -> None:
    length, steps = 8, 200
    batches, sizes = (
        make_batch_ramp(first, increment, last, tokens, length),
        walk(first, increment, last, tokens, 8, steps),
    )
    assert [batches.batch_size(step) for step in range(1, steps + 1)] == sizes
    assert [batches.consumed_samples(count) for count in range(steps + 1)] == [
        sum(sizes[:count]) for count in range(steps + 1)
    ]
    for samples in range(sum(sizes)):
        count = batches.steps_for_samples(samples)
        assert batches.consumed_samples(count) >= samples
        assert count == 0 or batches.consumed_samples(count - 1) < samples
    assert sizes[-1] == last


def test_each_size_has_an_equal_share_of_the_tokens() -> None:
    """The report's ramp, from the first start that is legal on its grid: 44 sizes before the full batch."""
    batches = make_batch_ramp(4096, 256, 15_360, 469_000_000_000, 4096)
    assert [level.batch_size for level in batches.levels] == list(range(4096, 15_361, 256))
    share = 469e9 / 4096 / 44
    for level, after in pairwise(batches.levels):
        assert after.samples_before - level.samples_before == pytest.approx(share, abs=level.batch_size)
    assert batches.levels[-1].samples_before == pytest.approx(469e9 / 4096, abs=15_360)


def test_without_a_ramp_all_steps_are_equal() -> None:
    for batches in (BatchRamp.constant(16), make_batch_ramp(16, 4, 16, 1000, 8)):
        assert batches.levels == BatchRamp.constant(16).levels
        for steps, rest in product(range(5), range(16)):
            assert batches.consumed_samples(steps) == 16 * steps
            assert batches.steps_for_samples(16 * steps - rest) == (steps if steps else 0)
