"""`shoestring rehearse`: run the real code of some ranks of a GPU run on fake CUDA tensors, and check their logs."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...comm.errors import ConfigError, Problem, raise_if_any
from ..answers.options import add_answer_options, add_override_arguments, print_answer
from ..console import print_to_stderr

if TYPE_CHECKING:
    from .result import RehearsalResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    add_override_arguments(parser)
    ranks = parser.add_mutually_exclusive_group()
    ranks.add_argument("--ranks", metavar="R,R,…", help="ranks to rehearse, such as 0,7,901")
    text = "one rank per pipeline rank, and a second member of one ep group and of one edp group (the default)"
    ranks.add_argument("--representative", action="store_true", help=text)
    text = "micro-batches per rank in the step (default: those of the run's first step)"
    parser.add_argument("--micro-batches", type=int, metavar="N", help=text)
    text = "list the N operations of an MoE layer that move the most bytes (default 0)"
    parser.add_argument("--top-operations", type=int, default=0, metavar="N", help=text)
    add_answer_options(parser)


def run(options: argparse.Namespace) -> int:
    """Rehearse the run that the options describe, and print the findings."""
    if options.top_operations < 0:
        raise ConfigError([Problem("--top-operations", options.top_operations, "must be at least 0")])
    print_to_stderr("reading the configuration")  # before torch is loaded, which takes seconds
    from ..run.launcher import StoppedBySignal
    from .answer import rehearsal_answer

    try:
        result = rehearse(options.overrides, options.config_dir, options.ranks, options.micro_batches, print_to_stderr)
    except StoppedBySignal as stop:
        print_to_stderr(f"shoestring rehearse: {stop}")
        return stop.exit_code
    return print_answer(options, rehearsal_answer(result, options.top_operations))


def rehearse(
    overrides: Sequence[str],
    config_dir: Path | None,
    listed: str | None,
    micro_batches: int | None,
    tell: Callable[[str], None],
    entry: Sequence[str] | None = None,
) -> "RehearsalResult":
    """Rehearse one optimizer step on the ranks of `listed`, such as `0,7,901`; None: representative ranks.

    `micro_batches` is the number per rank; None: that of the run's first step. `tell` prints one line of progress.
    `entry` are Python's arguments for the process of a rank; None: those of `processes.py`. Raises `ConfigError` before
    a process starts, and `RanksFailed`.
    """
    from ..compose import compose_run_config
    from .device.shim import build_autograd_shim
    from .gpu_config import gpu_run_config
    from .processes import RANK_MODULE_ARGUMENTS, RehearsalRequest, max_concurrent_processes, rehearse_ranks
    from .result import RehearsalResult
    from .select_ranks import micro_batch_problems, select_ranks

    config = compose_run_config(overrides, config_dir)
    raise_if_any(micro_batch_problems(config, micro_batches))
    config = gpu_run_config(config, micro_batches)
    ranks = select_ranks(config.topology, listed)
    directory = None if config_dir is None else str(config_dir.absolute())
    request = RehearsalRequest(tuple(overrides), directory, micro_batches, str(build_autograd_shim()))
    logs = rehearse_ranks(request, ranks, tell, max_concurrent_processes(), entry or RANK_MODULE_ARGUMENTS)
    return RehearsalResult(config, logs)
