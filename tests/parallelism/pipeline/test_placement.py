"""Where stages sit: both ways along every route, and who holds what twice."""

from __future__ import annotations

import pytest

from shoestring.parallelism.pipeline.placement import Direction, Placement, Route, StagePlace

LOOP, V, BIDIRECTIONAL = Route.LOOP, Route.V, Route.BIDIRECTIONAL
EVERY = [
    Placement(LOOP, 1, 1),
    Placement(LOOP, 4, 1),
    Placement(LOOP, 3, 4),
    Placement(V, 1, 2),
    Placement(V, 5, 2),
    Placement(BIDIRECTIONAL, 2, 2),
    Placement(BIDIRECTIONAL, 6, 2),
]


def path(placement: Placement, place: StagePlace) -> list[tuple[int, int]]:
    """Every (rank, chunk) from `place` to the last stage."""
    visited, here = [], place
    while True:
        visited.append((here.rank, here.chunk))
        following = placement.after(here)
        if following is None:
            return visited
        here = following


def test_the_way_of_a_micro_batch() -> None:
    assert path(Placement(LOOP, 2, 2), StagePlace(0, 0)) == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert path(Placement(V, 3, 2), StagePlace(0, 0)) == [(0, 0), (1, 0), (2, 0), (2, 1), (1, 1), (0, 1)]
    assert path(Placement(V, 1, 2), StagePlace(0, 0)) == [(0, 0), (0, 1)]
    assert path(Placement(BIDIRECTIONAL, 4, 2), StagePlace(0, 0)) == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert path(Placement(BIDIRECTIONAL, 4, 2), StagePlace(3, 1)) == [(3, 1), (2, 1), (1, 1), (0, 1)]


@pytest.mark.parametrize("placement", EVERY, ids=str)
def test_before_and_after_are_opposite_and_count_the_stages(placement: Placement) -> None:
    for place in placement.places():
        stage = placement.stage(place)
        assert placement.is_first(place) == (placement.before(place) is None) == (stage == 0)
        assert placement.is_last(place) == (placement.after(place) is None) == (stage == placement.stages - 1)
        if (following := placement.after(place)) is not None:
            assert placement.before(following) == place
            assert placement.stage(following) == stage + 1


@pytest.mark.parametrize("placement", EVERY, ids=str)
def test_every_stage_has_its_holders(placement: Placement) -> None:
    copies = 2 if placement.route is BIDIRECTIONAL else 1
    held = [placement.holders(stage) for stage in range(placement.stages)]
    assert {len(places) for places in held} == {copies}
    assert sorted(map(str, sum(held, ()))) == sorted(map(str, placement.places()))


def test_mirrored_ranks_hold_the_same_two_stages() -> None:
    placement = Placement(BIDIRECTIONAL, 6, 2)
    for rank in range(6):
        stages = {placement.stage(StagePlace(rank, chunk)) for chunk in range(2)}
        assert stages == {placement.stage(StagePlace(5 - rank, chunk)) for chunk in range(2)} == {rank, 5 - rank}


def test_who_can_share_embedding_and_head() -> None:
    assert [placement.shares_ends() for placement in EVERY] == [True, False, False, True, True, True, True]


def test_only_the_second_chunk_of_two_way_routes_goes_down() -> None:
    assert [Placement(V, 2, 2).direction(chunk) for chunk in range(2)] == [Direction.UP, Direction.DOWN]
    assert [Placement(LOOP, 2, 3).direction(chunk) for chunk in range(3)] == [Direction.UP] * 3
    assert Direction.UP.opposite is Direction.DOWN
    assert Direction.DOWN.opposite is Direction.UP
