"""The sums of a step over all ranks: exact, in one all-reduce."""

import math
from datetime import timedelta
from unittest.mock import patch

import pytest
import torch

from shoestring.comm.exchange.permutation import TokenCounts
from shoestring.comm.groups import Group, ProcessGroups
from shoestring.comm.topology import Topology
from shoestring.tests.processes import World, run_processes
from shoestring.trainer.run.step_reduction import RankStepTotals, StepTotals, all_reduce_step_totals

ROUTERS = ["layer_01", "layer_02", "mtp_01"]
EXPERTS = 4
MANY = 2**52 - 1  # tokens: FP32 would lose the last one of them


def share_of(rank: int, *, loss: float = 1.0) -> RankStepTotals:
    """Return totals: rank 0 holds the first router, rank 1 the others; both hold the second."""
    counts = {"layer_02": torch.tensor([MANY, rank, 0, 1])}
    bias = {"layer_02": torch.tensor([0.1, -0.3, 0.0, 0.7])}
    own = "layer_01" if rank == 0 else "mtp_01"
    counts[own], bias[own] = torch.arange(EXPERTS), torch.full((EXPERTS,), 0.001 * (rank + 1))
    losses = torch.tensor([loss, 2.0, 3.0], dtype=torch.float64)
    squares = torch.tensor(2.0 + rank, dtype=torch.float64)
    return RankStepTotals(losses, squares, counts, bias, TokenCounts(1, 2, 3, 4), votes=(rank == 1, True, False))


def total_of(world: World, loss: float) -> tuple[StepTotals, int]:
    """Return the totals and the number of all-reduces."""
    groups = ProcessGroups.create(Topology(edp=world.size), world.rank, timedelta(seconds=20))
    with patch.object(Group, "all_reduce_sum", autospec=True, side_effect=Group.all_reduce_sum) as reduce:
        totals = all_reduce_step_totals(share_of(world.rank, loss=loss), ROUTERS, EXPERTS, groups.world)
    return totals, reduce.call_count


def test_two_ranks_know_the_same_sums_after_one_reduction() -> None:
    for totals, reductions in run_processes(2, total_of, 1.0):
        assert reductions == 1
        assert (totals.loss_sums, totals.grad_square_sum) == ((2.0, 4.0, 6.0), 5.0)
        assert totals.token_counts == TokenCounts(2, 4, 6, 8)
        assert totals.vote_counts == (1, 2, 0)
        counts = {name: values.tolist() for name, values in totals.tokens_per_expert_E.items()}
        assert counts == {"layer_01": [0, 1, 2, 3], "layer_02": [2 * MANY, 1, 0, 2], "mtp_01": [0, 1, 2, 3]}
        assert all(values.dtype == torch.int64 for values in totals.tokens_per_expert_E.values())
        bias = {name: values.tolist() for name, values in totals.router_bias_E.items()}
        exact = {
            name: share_of(rank).router_bias_E[name].tolist()
            for rank in range(2)
            for name in share_of(rank).router_bias_E
        }
        assert bias == exact  # to the last bit, also where two ranks hold one router


def test_a_loss_that_is_not_finite_touches_no_other_sum() -> None:
    for totals, _ in run_processes(2, total_of, math.nan):
        assert math.isnan(totals.loss_sums[0])
        assert totals.loss_sums[1:] == (4.0, 6.0)
        assert (totals.grad_square_sum, totals.vote_counts) == (5.0, (1, 2, 0))


@pytest.mark.parametrize("routers", [[], ROUTERS])
def test_one_rank_sums_alone(routers: list[str]) -> None:
    alone = Group((0,), None, 0, timedelta(seconds=1))
    share = share_of(0)
    bias = {name: share.router_bias_E.get(name, torch.zeros(EXPERTS)) for name in routers}
    whole = RankStepTotals(
        share.loss_sums,
        share.grad_square_sum,
        share.tokens_per_expert_E if routers else {},
        bias,
        share.token_counts,
        share.votes,
    )
    totals = all_reduce_step_totals(whole, routers, EXPERTS, alone)
    assert (totals.loss_sums, totals.vote_counts, list(totals.tokens_per_expert_E)) == (
        (1.0, 2.0, 3.0),
        (0, 1, 0),
        routers,
    )
