"""`shoestring rehearse`: run the real code of some ranks of a GPU run on fake CUDA tensors, and check their logs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ...comm.errors import raise_if_any
from ..compose import compose_run_config
from ..rehearsal.device.shim import build_autograd_shim
from ..rehearsal.gpu_config import gpu_run_config
from ..rehearsal.processes import RANK_MODULE_ARGUMENTS, RehearsalRequest, max_concurrent_processes, rehearse_ranks
from ..rehearsal.result import RehearsalResult, evaluate_rank_logs
from ..rehearsal.select_ranks import micro_batch_problems, select_ranks


def rehearse(
    overrides: Sequence[str],
    config_dir: Path | None,
    listed: str | None,
    micro_batches: int | None,
    tell: Callable[[str], None],
    entry: Sequence[str] = RANK_MODULE_ARGUMENTS,
) -> RehearsalResult:
    """Rehearse one optimizer step on the ranks of `listed`, such as `0,7,901`; None: representative ranks.

    `micro_batches` is the number per rank; None: that of the run's first step. `tell` prints one line of progress.
    Raises `ConfigError` before a process starts, and `RanksFailed`.
    """
    config = compose_run_config(overrides, config_dir)
    raise_if_any(micro_batch_problems(config, micro_batches))
    config = gpu_run_config(config, micro_batches)
    ranks = select_ranks(config.topology, listed)
    directory = None if config_dir is None else str(config_dir.absolute())
    request = RehearsalRequest(tuple(overrides), directory, micro_batches, str(build_autograd_shim()))
    return evaluate_rank_logs(config, rehearse_ranks(request, ranks, tell, max_concurrent_processes(), entry))
