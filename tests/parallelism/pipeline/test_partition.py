"""The search is exact and its ties are decided; an impossible layout is refused."""

import random
from itertools import combinations, pairwise

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.parallelism.pipeline.partition import LayerPartition, partition_layers


def every_layout(layers: int, stages: int) -> list[tuple[int, ...]]:
    cuts = combinations(range(1, layers), stages - 1)
    return [tuple(after - before for before, after in pairwise((0, *cut, layers))) for cut in cuts]


def test_it_is_the_best_of_all_layouts() -> None:
    generator = random.Random(5)
    for _ in range(60):
        layers = generator.randint(1, 9)
        stages = generator.randint(1, layers)
        costs = [float(generator.randint(1, 6)) for _ in range(layers)]
        first, last = float(generator.randint(0, 4)), float(generator.randint(0, 9))
        found = partition_layers(costs, stages, first, last)

        def rank(layout: tuple[int, ...]) -> tuple[float, float, tuple[int, ...]]:
            split = partition_layers(costs, stages, first, last, layout)  # noqa: B023
            return max(split.stage_costs), sum(cost**2 for cost in split.stage_costs), layout

        assert found.layers_per_stage == min(every_layout(layers, stages), key=rank)


def test_the_extras_of_the_ends_count() -> None:
    assert partition_layers([1.0] * 6, 3).layers_per_stage == (2, 2, 2)
    assert partition_layers([1.0] * 8, 3, first_stage_extra=1.0, last_stage_extra=3.0) == LayerPartition(
        (3, 4, 1), (4.0, 4.0, 4.0)
    )
    assert partition_layers([1.0] * 8, 1, first_stage_extra=1.0, last_stage_extra=3.0).stage_costs == (12.0,)


def test_what_is_left_over_goes_to_later_stages() -> None:
    assert partition_layers([1.0] * 7, 3).layers_per_stage == (2, 2, 3)
    assert partition_layers([1.0] * 8, 3).layers_per_stage == (2, 3, 3)


def test_ties_do_not_hang_on_rounding() -> None:
    assert (
        partition_layers([0.1] * 61, 16).layers_per_stage
        == partition_layers([1.0] * 61, 16).layers_per_stage
        == (3,) * 3 + (4,) * 13
    )


def test_ranges_and_imbalance() -> None:
    assert partition_layers([1.0, 2.0, 3.0, 2.0], 2).layer_ranges == (range(2), range(2, 4))
    assert LayerPartition((1, 1), (1.0, 3.0)).imbalance == pytest.approx(0.5)


def test_a_layout_overrides_the_search() -> None:
    assert partition_layers([1.0] * 5, 2, last_stage_extra=1.0, layers_per_stage=[1, 4]) == LayerPartition(
        (1, 4), (1.0, 5.0)
    )


@pytest.mark.parametrize(
    ("layers", "stages", "layout", "hints"),
    [
        (3, 4, None, ["every stage holds at least one of 3 layers"]),
        (3, 0, None, ["must be from 1 to 3"]),
        (6, 3, [2, 4], ["has 2 stages; write the layers of each of the 3"]),
        (6, 3, [2, 2, 3], ["has 7 layers in all; the model has 6"]),
        (6, 3, [0, 7, -1], ["stages 0, 2: must hold at least 1 layer"]),
        (6, 3, [0, 5], ["has 2 stages", "has 5 layers in all", "stage 0: must hold"]),
    ],
)
def test_impossible_splits_are_refused_with_everything_wrong(
    layers: int, stages: int, layout: list[int] | None, hints: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        partition_layers([1.0] * layers, stages, layers_per_stage=layout)
    assert len(caught.value.problems) == len(hints)
    for problem, words in zip(caught.value.problems, hints, strict=True):
        assert words in problem.hint
