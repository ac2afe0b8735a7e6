"""One rank of `shoestring memory --measure`: builds what a training run would and takes steps on random tokens."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from ...comm.bootstrap import WorkerEnvironment, start_default_group
from ...comm.groups import ProcessGroups
from ...comm.open_groups import open_groups_on
from ...trainer.build import stages_of
from ...trainer.memory.measured import measure
from ..compose import compose_run
from ..run.worker import pick_device


def main(arguments: Sequence[str]) -> None:
    """Measure the run that overrides and directory in the first argument describe; rank 0 writes all to the second."""
    worker = WorkerEnvironment.read()
    assert worker is not None
    overrides, directory, skewed = json.loads(arguments[0])
    config = compose_run(overrides, None if directory is None else Path(directory))
    device = pick_device(config, worker)
    limit = timedelta(seconds=config.training.collective_timeout_seconds)
    start_default_group(worker, device, timedelta(seconds=config.training.start_timeout_seconds))
    holders, make = stages_of(config).all_holders(), open_groups_on(device, worker.rank, limit)
    groups = ProcessGroups.create(config.topology, worker.rank, limit, holders, make)
    own = measure(config, groups, device, skewed=skewed)
    everyone = groups.control.all_gather_objects((str(device), own.tree()), "measured memory")
    if worker.rank == 0:
        Path(arguments[1]).write_text(json.dumps(everyone))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
