"""One rank of `shoestring memory --measure`: it builds a rank of a training run and runs steps on random tokens."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from ...comm.bootstrap import TorchrunEnvironment, init_default_process_group
from ...comm.group_factory import build_group_factory
from ...comm.groups import ProcessGroups
from ...trainer.build import build_stage_layout
from ...trainer.memory.measured import measure_step_memory
from ..compose import compose_run_config
from ..run.worker import pick_device


def main(arguments: Sequence[str]) -> None:
    """Measure the run that the first argument describes as JSON; rank 0 writes all results to the second."""
    worker = TorchrunEnvironment.read()
    assert worker is not None
    overrides, directory, skewed = json.loads(arguments[0])
    config = compose_run_config(overrides, None if directory is None else Path(directory))
    device = pick_device(config, worker)
    limit = timedelta(seconds=config.training.collective_timeout_seconds)
    init_default_process_group(worker, device, timedelta(seconds=config.training.start_timeout_seconds))
    replica_groups, make = (
        build_stage_layout(config).replica_pp_groups(),
        build_group_factory(device, worker.rank, limit),
    )
    groups = ProcessGroups.create(config.topology, worker.rank, limit, replica_groups, make)
    measured = measure_step_memory(config, groups, device, skewed=skewed)
    by_rank = groups.world_cpu.all_gather_objects((str(device), measured.to_dict()), "measured memory")
    if worker.rank == 0:
        Path(arguments[1]).write_text(json.dumps(by_rank))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
