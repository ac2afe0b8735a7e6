"""`shoestring train`: check everything, then start the ranks under torchrun; inside torchrun, be one of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ...comm.bootstrap import WorkerEnvironment
from ...comm.errors import ConfigError, Problem
from ..compose import compose_run
from .identity import ATTEMPT_VARIABLE
from .launcher import LocalRanks, launch
from .preflight import preflight
from .torchrun import local_torchrun
from .worker import run_worker


def train_command(overrides: Sequence[str], config_dir: Path | None, *, fresh: bool) -> int:
    """Run `shoestring train`; return its exit code. Raises `ConfigError` before any process or file exists."""
    config = compose_run(overrides, config_dir)
    worker = WorkerEnvironment.read()
    if worker is not None:
        if fresh and ATTEMPT_VARIABLE not in os.environ:
            hint = "belongs to the launcher and cannot be honored by a rank; use launch/torchrun.sh --fresh"
            raise ConfigError([Problem("--fresh", True, hint)])
        return run_worker(config, worker)
    ranks = config.topology.world_size
    preflight(config, ranks, fresh=fresh)
    return launch(config, LocalRanks(ranks, tuple(local_torchrun(ranks))), fresh=fresh)
