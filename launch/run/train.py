"""`shoestring train`: run the checks, then start the ranks under torchrun; inside torchrun, run one of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ...comm.bootstrap import TorchrunEnvironment
from ...comm.errors import ConfigError, Problem
from ..compose import compose_run_config
from .fingerprint import ATTEMPT_ENV_VAR
from .launcher import LocalRanks, launch_run
from .preflight import run_preflight_checks
from .torchrun import local_torchrun_arguments
from .worker import run_rank


def train_command(overrides: Sequence[str], config_dir: Path | None, *, fresh: bool) -> int:
    """Run `shoestring train`; return its exit code. Raises `ConfigError` before any process or file exists."""
    config = compose_run_config(overrides, config_dir)
    worker = TorchrunEnvironment.read()
    if worker is not None:
        if fresh and ATTEMPT_ENV_VAR not in os.environ:
            hint = "is an option of the launcher, not of a rank; use launch/torchrun.sh --fresh"
            raise ConfigError([Problem("--fresh", True, hint)])
        return run_rank(config, worker)
    ranks = config.topology.world_size
    run_preflight_checks(config, ranks, fresh=fresh)
    return launch_run(config, LocalRanks(ranks, tuple(local_torchrun_arguments(ranks))), fresh=fresh)
