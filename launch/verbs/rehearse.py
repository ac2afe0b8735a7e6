"""`shoestring rehearse`: the real code of some ranks of a GPU run on fake CUDA tensors, and what their logs show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ...comm.errors import refuse_if_any
from ..compose import compose_run
from ..rehearsal.choose import chosen_ranks, micro_batch_problems
from ..rehearsal.configured import on_gpu
from ..rehearsal.device.shim import build_shim
from ..rehearsal.processes import RANK, RehearsalRequest, processes_at_once, rehearse_ranks
from ..rehearsal.verdict import Verdict, judge


def rehearse(
    overrides: Sequence[str],
    config_dir: Path | None,
    listed: str | None,
    micro_batches: int | None,
    tell: Callable[[str], None],
    entry: Sequence[str] = RANK,
) -> Verdict:
    """Rehearse one optimizer step on the ranks of `listed`, such as `0,7,901`; None: the representative ones.

    `micro_batches` are those of one rank in the step; None: of the run's first. `tell` gets a line of progress at a
    time. Raises `ConfigError` before a process starts, and `RanksFailed`.
    """
    config = compose_run(overrides, config_dir)
    refuse_if_any(micro_batch_problems(config, micro_batches))
    config = on_gpu(config, micro_batches)
    ranks = chosen_ranks(config.topology, listed)
    directory = None if config_dir is None else str(config_dir.absolute())
    request = RehearsalRequest(tuple(overrides), directory, micro_batches, str(build_shim()))
    return judge(config, rehearse_ranks(request, ranks, tell, processes_at_once(), entry))
