"""`shoestring train`: check everything, start the ranks under torchrun, account for them; inside it, be one."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from ..comm.bootstrap import WorkerEnvironment
from ..trainer.budget.allocation import Allocation
from ..trainer.checkpoint.store import CheckpointStore
from ..trainer.config import RunConfig
from ..trainer.data.prepared import open_prepared
from ..trainer.rank import open_samples
from .compose import compose_run, to_yaml
from .run_dir import CONFIG_FILE, claimed, read_status
from .worker import ATTEMPT_VARIABLE, die_with_parent, run_worker

_INTERRUPTED = 130


def train_command(overrides: Sequence[str], config_dir: Path | None, *, fresh: bool) -> int:
    """Run `shoestring train`; return its exit code. Raises `Refused` before any process or file exists."""
    config = compose_run(overrides, config_dir)
    worker = WorkerEnvironment.read()
    if worker is not None:
        return run_worker(config, worker)
    open_samples(config, open_prepared(config.data))  # refuses missing, damaged or unfitting data
    run_dir = Path(config.training.run_dir)
    with claimed(run_dir, fresh=fresh):
        done = CheckpointStore(run_dir / "checkpoints", config.training.keep_checkpoints).steps()
        if done and done[-1] >= config.total_steps:
            print(f"{run_dir} is finished: {done[-1]} steps. --fresh starts over; a larger training.tokens goes on.")
            return 0
        (run_dir / CONFIG_FILE).write_text(to_yaml(config))
        arguments = [*overrides, *([] if config_dir is None else ["--config-dir", str(config_dir)])]
        return _launch(config, run_dir, arguments)


def _launch(config: RunConfig, run_dir: Path, arguments: Sequence[str]) -> int:
    """Hold the GPUs in the ledger while torchrun runs the ranks; map what they wrote to an exit code."""
    attempt, ranks = uuid.uuid4().hex[:12], config.topology.world_size
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "shoestring.launch.cli", "train", *arguments]
    environment = os.environ | {ATTEMPT_VARIABLE: attempt}
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    environment.setdefault(
        "OMP_NUM_THREADS", "1"
    )  # with a thread pool each, ranks of one CPU spend their time spinning
    allocation = Allocation(run_dir, ranks=ranks, attempt=attempt, budget=config.budget)
    reason = "the launcher failed"
    try:
        code = subprocess.run(command, env=environment, preexec_fn=die_with_parent, check=False).returncode
        status = read_status(run_dir)
        reason = f"torchrun exited with {code}" if status is None else str(status["reason"])
        return code or 1 if status is None else int(str(status["exit_code"]))
    except KeyboardInterrupt:
        reason = "interrupted"
        return _INTERRUPTED
    finally:
        allocation.close(reason)
