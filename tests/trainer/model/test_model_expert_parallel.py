"""Experts over several processes give the losses, loads and gradients of one process."""

from dataclasses import replace
from datetime import timedelta

import pytest
import torch
from torch import Tensor

from shoestring.comm.groups import ProcessGroups
from shoestring.comm.topology import Topology
from shoestring.tests.processes import World, run_processes
from shoestring.tests.reference.configs import random_params, reference_configs
from shoestring.tests.trainer.model.released import largest_difference, make_chunk, released_gradients, run_losses
from shoestring.trainer.build import build_optimizer
from shoestring.trainer.model.forward_context import LossNormalizers
from shoestring.trainer.model.stage_layout import StageLayout
from shoestring.trainer.optimizer.config import OptimizerConfig

TOLERANCE = {"float64": 1e-10, "float32": 5e-6}
SEQUENCES, LENGTH = 4, 12
# One expert in four is never chosen: with four ranks, one of them receives no token.
STARVED = replace(reference_configs()["one_group"], num_experts_per_tok=2)
CONFIGS = {"full": reference_configs()["full"], "two_mtp": reference_configs()["two_mtp"], "starved": STARVED}

Outcome = tuple[float, float, float, dict[str, list[int]], dict[str, Tensor], float]


def parameters(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    params = random_params(CONFIGS[name], seed=11, dtype=dtype)
    if name == "starved":
        for key, value in params.items():
            if key.endswith("e_score_correction_bias"):
                value[len(value) // 4 : len(value) // 2] = -100.0
    return params


def run_rank(topology: Topology, rank: int, name: str, dtype_name: str) -> Outcome:
    """Return this rank's sums, loads, own reduced gradients and the global norm after a forward and a backward."""
    config, dtype = CONFIGS[name], {"float64": torch.float64, "float32": torch.float32}[dtype_name]
    chunk = make_chunk(config, parameters(name, dtype), dtype, topology, rank)
    groups = ProcessGroups.create(topology, rank, timedelta(seconds=30))
    stages = StageLayout.build(chunk.model.config, LENGTH)
    program = stages.build_checked_program(1)
    reducer = build_optimizer(chunk.model, stages, program, groups, OptimizerConfig(), dtype).reducer
    generator = torch.Generator().manual_seed(2)
    tokens_BW = torch.randint(
        0, config.vocab_size, (SEQUENCES, LENGTH + 1 + config.num_nextn_predict_layers), generator=generator
    )
    valid_BW = torch.ones_like(tokens_BW, dtype=torch.bool)
    valid_BW[-1, 5:] = False
    share = SEQUENCES // topology.dp
    mine = slice(topology.dp_rank(rank) * share, (topology.dp_rank(rank) + 1) * share)
    scales = LossNormalizers(main_loss=1 / 40, mtp_loss=0.3 / 40, balance_loss=0.1 / SEQUENCES)
    forward = run_losses(chunk, tokens_BW[mine], valid_BW[mine], scales)

    reducer.finish_reduction()
    summary = forward.metrics
    sums = torch.stack((summary.main_loss_sum, summary.mtp_loss_sum, summary.balance_loss_sum)).double()
    groups.world.all_reduce_sum(sums, "sums")
    loads = {
        key: groups.world.all_reduce_sum(load.clone(), "load").tolist()
        for key, load in forward.metrics.tokens_per_expert_E.items()
    }
    main, mtp, balance = sums.tolist()
    norm = reducer.gradient_norm(groups.world)
    for bucket in reducer.buckets:
        bucket.group.all_gather(bucket.grads_GN, "gradients for a test")
    return main, mtp, balance, loads, released_gradients(chunk.model), norm


def in_process(world: World, topology: Topology, name: str, dtype_name: str) -> Outcome:
    return run_rank(topology, world.rank, name, dtype_name)


@pytest.mark.parametrize("dtype_name", TOLERANCE)
@pytest.mark.parametrize(
    "topology", [Topology(ep=2), Topology(ep=4), Topology(ep=2, edp=2)], ids=["ep2", "ep4", "ep2edp2"]
)
@pytest.mark.parametrize("name", CONFIGS)
def test_any_split_of_the_experts_gives_the_same_numbers(name: str, topology: Topology, dtype_name: str) -> None:
    tolerance = TOLERANCE[dtype_name]
    main, mtp, balance, loads, gradients, norm = run_rank(Topology(), 0, name, dtype_name)
    if name == "starved":
        load = loads["layer_00"]
        assert sum(load[len(load) // 4 : len(load) // 2]) == 0
    for outcome in run_processes(topology.world_size, in_process, topology, name, dtype_name):
        assert outcome[:3] == pytest.approx((main, mtp, balance), rel=tolerance)
        assert outcome[3] == loads
        assert largest_difference(outcome[4], gradients) <= tolerance
        assert outcome[5] == pytest.approx(norm, rel=tolerance)
