"""The ranks of stages: both directions along every route, and the stages held twice."""

import pytest

from shoestring.parallelism.pipeline.placement import Direction, PlacementStyle, StageLocation, StagePlacement

LOOP, V, BIDIRECTIONAL = PlacementStyle.LOOP, PlacementStyle.V, PlacementStyle.BIDIRECTIONAL
EVERY = [
    StagePlacement(LOOP, 1, 1),
    StagePlacement(LOOP, 4, 1),
    StagePlacement(LOOP, 3, 4),
    StagePlacement(V, 1, 2),
    StagePlacement(V, 5, 2),
    StagePlacement(BIDIRECTIONAL, 2, 2),
    StagePlacement(BIDIRECTIONAL, 6, 2),
]


def path(placement: StagePlacement, place: StageLocation) -> list[tuple[int, int]]:
    """Return every (rank, chunk) from `place` to the last stage."""
    visited, here = [], place
    while True:
        visited.append((here.rank, here.chunk))
        following = placement.next_location(here)
        if following is None:
            return visited
        here = following


def test_the_way_of_a_micro_batch() -> None:
    assert path(StagePlacement(LOOP, 2, 2), StageLocation(0, 0)) == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert path(StagePlacement(V, 3, 2), StageLocation(0, 0)) == [(0, 0), (1, 0), (2, 0), (2, 1), (1, 1), (0, 1)]
    assert path(StagePlacement(V, 1, 2), StageLocation(0, 0)) == [(0, 0), (0, 1)]
    assert path(StagePlacement(BIDIRECTIONAL, 4, 2), StageLocation(0, 0)) == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert path(StagePlacement(BIDIRECTIONAL, 4, 2), StageLocation(3, 1)) == [(3, 1), (2, 1), (1, 1), (0, 1)]


@pytest.mark.parametrize("placement", EVERY, ids=str)
def test_before_and_after_are_opposite_and_count_the_stages(placement: StagePlacement) -> None:
    for place in placement.all_locations():
        stage = placement.stage_at(place)
        assert placement.is_first_stage(place) == (placement.previous_location(place) is None) == (stage == 0)
        assert (
            placement.is_last_stage(place)
            == (placement.next_location(place) is None)
            == (stage == placement.num_stages - 1)
        )
        if (following := placement.next_location(place)) is not None:
            assert placement.previous_location(following) == place
            assert placement.stage_at(following) == stage + 1


@pytest.mark.parametrize("placement", EVERY, ids=str)
def test_every_stage_has_its_holders(placement: StagePlacement) -> None:
    copies = 2 if placement.style is BIDIRECTIONAL else 1
    held = [placement.locations_of_stage(stage) for stage in range(placement.num_stages)]
    assert {len(places) for places in held} == {copies}
    assert sorted(map(str, sum(held, ()))) == sorted(map(str, placement.all_locations()))


def test_mirrored_ranks_hold_the_same_two_stages() -> None:
    placement = StagePlacement(BIDIRECTIONAL, 6, 2)
    for rank in range(6):
        stages = {placement.stage_at(StageLocation(rank, chunk)) for chunk in range(2)}
        assert stages == {placement.stage_at(StageLocation(5 - rank, chunk)) for chunk in range(2)} == {rank, 5 - rank}


def test_who_can_share_embedding_and_head() -> None:
    assert [placement.first_and_last_stage_colocated() for placement in EVERY] == [
        True,
        False,
        False,
        True,
        True,
        True,
        True,
    ]


def test_only_the_second_chunk_of_two_way_routes_goes_down() -> None:
    assert [StagePlacement(V, 2, 2).direction_of_chunk(chunk) for chunk in range(2)] == [Direction.NEXT, Direction.PREV]
    assert [StagePlacement(LOOP, 2, 3).direction_of_chunk(chunk) for chunk in range(3)] == [Direction.NEXT] * 3
    assert Direction.NEXT.opposite is Direction.PREV
    assert Direction.PREV.opposite is Direction.NEXT
