"""Small runs whose memory is measured."""

from datetime import timedelta

import torch

from shoestring.comm.groups import ProcessGroups
from shoestring.launch.compose import compose_run_config
from shoestring.tests.processes import World, run_processes
from shoestring.trainer.build import build_stage_layout
from shoestring.trainer.memory.forecast import MemoryPredictor
from shoestring.trainer.memory.measured import MeasuredMemory, measure_step_memory

CPU = torch.device("cpu")
BASE = "model=tiny model.num_hidden_layers=3 training.sequence_length=128 training.global_batch_size=8"
ONE_RANK = "topology.ep=4 training.global_batch_size=4"


def measured(world: World, overrides: list[str], skewed: bool) -> MeasuredMemory:
    config = compose_run_config(overrides)
    limit = timedelta(seconds=60)
    groups = ProcessGroups.create(config.topology, world.rank, limit, build_stage_layout(config).replica_pp_groups())
    return measure_step_memory(config, groups, CPU, skewed=skewed)


def run(overrides: str, *, skewed: bool = False) -> tuple[MemoryPredictor, list[MeasuredMemory]]:
    described = f"{BASE} {overrides}".split()
    memory = MemoryPredictor(compose_run_config(described), CPU)
    ranks = memory.config.topology.world_size
    return memory, run_processes(ranks, measured, described, skewed, timeout=200)
