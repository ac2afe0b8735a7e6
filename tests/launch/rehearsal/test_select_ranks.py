"""The ranks that are rehearsed, and refused selections."""

import pytest

from shoestring.comm.errors import raise_if_any
from shoestring.comm.topology import Topology
from shoestring.launch.compose import compose_run_config
from shoestring.launch.rehearsal.select_ranks import micro_batch_problems, representative_ranks, select_ranks

from ..refusals import refused

V3 = Topology(pp=16, edp=2, ep=64)


def test_representative_ranks_of_deepseeks_grid() -> None:
    """One per pipeline position, all of one pipeline, and two neighbors of the middle one."""
    ranks = representative_ranks(V3)
    assert ranks == (*range(0, 1025, 128), 1025, 1088, *range(1152, 2048, 128))
    assert len(ranks) == 18
    assert {V3.pp_rank(rank) for rank in ranks} == set(range(16))
    assert V3.ep_ranks(1024) == V3.ep_ranks(1025)
    assert V3.expert_dp_ranks(1024) == V3.expert_dp_ranks(1088)
    assert V3.pp_ranks(0) == ranks[:9] + ranks[11:]


@pytest.mark.parametrize(
    ("topology", "expected"),
    [(Topology(), (0,)), (Topology(ep=4), (0, 1)), (Topology(edp=2), (0, 1)), (Topology(pp=2, edp=2), (0, 2, 3))],
)
def test_representative_ranks_of_small_grids(topology: Topology, expected: tuple[int, ...]) -> None:
    assert representative_ranks(topology) == expected


def test_listed_ranks() -> None:
    assert select_ranks(V3, "901,0,7") == (0, 7, 901)
    assert select_ranks(V3, None) == representative_ranks(V3)


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        ("0,x", "'x': write rank numbers separated by commas, as in 0,7,901"),
        ("0,2048", "2048: the run has 2048 ranks; write numbers from 0 to 2047"),
        ("-1", "-1: the run has 2048 ranks; write numbers from 0 to 2047"),
        ("7,7", "7: is repeated; write each rank once"),
        ("", "'': write rank numbers"),
    ],
)
def test_ranks_that_the_run_does_not_have(listed: str, said: str) -> None:
    assert said in refused(select_ranks, V3, listed)["--ranks"]


def test_micro_batches_that_the_schedule_does_not_take() -> None:
    config = compose_run_config(["experiment=deepseek_v3_h800"])
    assert not list(micro_batch_problems(config, None))
    assert not list(micro_batch_problems(config, 32))
    for number in (30, 33, 0):
        said = refused(lambda n=number: raise_if_any(micro_batch_problems(config, n)))["--micro-batches"]
        assert said.startswith(f"{number}: dualpipe on 16 ranks needs an even number")
