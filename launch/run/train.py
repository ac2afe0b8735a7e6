"""`shoestring train`: run the checks, then start the ranks under torchrun; inside torchrun, run one of them."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from ...comm.errors import ConfigError, Problem
from ..answers.options import add_override_arguments
from ..console import print_or_raise


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    add_override_arguments(parser, with_fresh=True)
    parser.add_argument("--cfg", choices=["job"], help="print the composed configuration, do not train")


def run(options: argparse.Namespace) -> int:
    """Train the run that the options describe, or print its configuration."""
    if not options.cfg:
        return train_command(options.overrides, options.config_dir, fresh=options.fresh)
    from ..compose import compose_run_config, config_to_yaml

    config = compose_run_config(options.overrides, options.config_dir)
    print_or_raise(config_to_yaml(config).removesuffix("\n"))
    return 0


def train_command(overrides: Sequence[str], config_dir: Path | None, *, fresh: bool) -> int:
    """Run `shoestring train`; return its exit code. Raises `ConfigError` before any process or file exists."""
    # Not at the top: --help needs no torch, whose import takes seconds.
    from ...comm.bootstrap import TorchrunEnvironment
    from ..compose import compose_run_config
    from .fingerprint import ATTEMPT_ENV_VAR
    from .launcher import LocalRanks, launch_run
    from .preflight import run_preflight_checks
    from .torchrun import local_torchrun_arguments
    from .worker import run_rank

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
