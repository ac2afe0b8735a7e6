"""Creation of process groups: few calls where the library can split, and the right ranks in each."""

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import cast

import pytest

from shoestring.comm.communicator import Collectives
from shoestring.comm.groups import P2P_MAX_CTAS, REDUCE_MAX_CTAS, Group, ProcessGroups
from shoestring.comm.topology import Topology
from shoestring.comm.watchdog import Watchdog
from shoestring.launch.compose import compose_run_config
from shoestring.trainer.build import build_stage_layout

LIMIT = timedelta(seconds=1)


class Drawn:
    """A `GroupFactory` that records its calls; a communicator is the tuple of its ranks."""

    def __init__(self, rank: int) -> None:
        self.creation_calls = 1
        self.made: list[tuple[str, list[tuple[int, ...]], int | None]] = []
        self._rank = rank

    def create_world_cpu(self, ranks: tuple[int, ...], world: Collectives | None) -> Collectives | None:
        self.creation_calls += 1
        return cast("Collectives", ranks)

    def split_group(self, name: str, parts: Sequence[tuple[int, ...]], max_ctas: int | None) -> Collectives | None:
        self.creation_calls += 1
        self.made.append((name, list(parts), max_ctas))
        return cast("Collectives | None", next((ranks for ranks in parts if self._rank in ranks), None))


def groups_of(groups: ProcessGroups) -> list[Group]:
    named = [
        groups.world,
        groups.world_cpu,
        groups.ep,
        groups.ep_inter_node,
        groups.ep_intra_node,
        groups.pp_next,
        groups.pp_prev,
    ]
    return [*named, *groups.dense_dp.values(), *groups.expert_dp.values()]


@pytest.mark.parametrize("rank", [0, 901, 2047])
def test_2048_ranks_make_their_groups_in_at_most_twenty_calls(rank: int) -> None:
    config = compose_run_config(["experiment=deepseek_v3_h800"])
    drawn = Drawn(rank)
    groups = ProcessGroups.create(config.topology, rank, LIMIT, build_stage_layout(config).replica_pp_groups(), drawn)
    assert drawn.creation_calls <= 20
    for group in groups_of(groups):  # each has its own ranks, and no other group's communicator
        assert cast("object", group.communicator) == (group.ranks if group.size > 1 else None)
        assert rank in group.ranks
    for _, parts, _ in drawn.made:  # a split takes disjoint groups
        ranks = [rank for part in parts for rank in part]
        assert len(ranks) == len(set(ranks))


def test_every_rank_makes_the_same_groups_in_the_same_order() -> None:
    topology, holders = Topology(pp=4, edp=2, ep=2, gpus_per_node=2), [(0, 3), (1, 2), (0, 1, 2, 3)]
    made = []
    for rank in range(topology.world_size):
        drawn = Drawn(rank)
        groups = ProcessGroups.create(topology, rank, LIMIT, holders, drawn)
        made.append(drawn.made)
        pp_rank = topology.pp_rank(rank)
        kept = {(pp_rank,), (0, 1, 2, 3), (0, 3) if pp_rank in (0, 3) else (1, 2)}
        assert set(groups.dense_dp) == set(groups.expert_dp) == kept
        for each in kept:
            assert groups.dense_dp[each].ranks == topology.map_to_pp_ranks(topology.dense_dp_ranks(rank), each)
            assert groups.expert_dp[each].ranks == topology.map_to_pp_ranks(topology.expert_dp_ranks(rank), each)
    assert all(each == made[0] for each in made)


def test_a_group_that_is_not_made_in_time_is_named(tmp_path: Path) -> None:
    """The watchdog covers the creation of groups: a split waits for all ranks of the parent."""
    now, ends = [0.0], list[int]()
    told = (tmp_path / "told").open("w")
    watchdog = Watchdog(0, timedelta(seconds=5), tmp_path, clock=lambda: now[0], exit_process=ends.append, output=told)

    class Slow(Drawn):
        def split_group(self, name: str, parts: Sequence[tuple[int, ...]], max_ctas: int | None) -> Collectives | None:
            now[0] += 6
            watchdog.exit_if_overdue()
            return super().split_group(name, parts, max_ctas)

    with told:
        ProcessGroups.create(Topology(ep=2), 0, LIMIT, (), Slow(0), watchdog)
    assert ends
    assert "creating the process groups 'ep' with ranks 1 has not returned" in (tmp_path / "told").read_text()


def test_messages_and_reductions_get_few_thread_blocks() -> None:
    drawn = Drawn(0)
    ProcessGroups.create(Topology(pp=2, ep=2), 0, LIMIT, [(0, 1)], drawn)
    blocks = {name: max_ctas for name, _, max_ctas in drawn.made}
    assert {blocks["pp next"], blocks["pp prev"]} == {P2P_MAX_CTAS}
    assert {blocks["dense gradients"], blocks["expert gradients"]} == {REDUCE_MAX_CTAS}
    assert blocks["ep"] is None
