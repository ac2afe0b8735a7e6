"""`shoestring train`: check everything, then start the ranks under torchrun and account for them; inside torchrun, be one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from ..comm.bootstrap import WorkerEnvironment
from ..comm.refusal import Problem, Refused
from ..trainer.budget.allocation import Allocation
from ..trainer.config import RunConfig
from .compose import compose_run, to_yaml

CONFIG_FILE = "config.yaml"


def train_command(overrides: Sequence[str], config_dir: Path | None, *, fresh: bool) -> int:
    """Run `shoestring train`; return its exit code. Raises `Refused` before any process or file exists."""
    config = compose_run(overrides, config_dir)
    worker = WorkerEnvironment.read()
    if worker is not None:
        from .worker import run_worker  # imports torch's distributed machinery, which the launcher does without

        return run_worker(config, worker)
    check_data(config)
    run_dir = Path(config.training.run_dir)
    _prepare_run_dir(run_dir, fresh=fresh)
    (run_dir / CONFIG_FILE).write_text(to_yaml(config))
    return _launch(config, run_dir, overrides, config_dir)


def check_data(config: RunConfig) -> None:
    """Refuse a run whose prepared data is missing, damaged, or made for another vocabulary."""
    from ..trainer.data.prepared import Prepared
    from ..trainer.data.samples import Samples

    prepared = Prepared.open(Path(config.data.prepared))
    if prepared.manifest.vocabulary != config.model.vocabulary:
        remedy = (
            f"its tokenizer has {prepared.manifest.vocabulary} tokens, model.vocabulary is {config.model.vocabulary}"
        )
        raise Refused([Problem("data.prepared", config.data.prepared, remedy)])
    for split in ("train", "validation"):
        Samples(prepared.split(split), config.training.sequence_length, config.model.mtp_depth)


def _prepare_run_dir(run_dir: Path, *, fresh: bool) -> None:
    """Make the run directory, empty if `fresh`; refuse to empty or to write one that is not a run's."""
    foreign = run_dir.exists() and (
        not run_dir.is_dir() or (any(run_dir.iterdir()) and not (run_dir / CONFIG_FILE).exists())
    )
    if foreign:
        remedy = f"exists and is not a run directory (it holds no {CONFIG_FILE}); name another"
        raise Refused([Problem("training.run_dir", str(run_dir), remedy)])
    try:
        if fresh and run_dir.exists():
            shutil.rmtree(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused([Problem("training.run_dir", str(run_dir), f"cannot be written: {error.strerror}")]) from error


def _launch(config: RunConfig, run_dir: Path, overrides: Sequence[str], config_dir: Path | None) -> int:
    """Hold the GPUs in the ledger while torchrun runs the ranks; map what they wrote to an exit code."""
    from .worker import ATTEMPT_VARIABLE, STATUS_FILE, die_with_parent, read_status

    attempt = uuid.uuid4().hex[:12]
    ranks = config.topology.world_size
    allocation = Allocation(run_dir, ranks=ranks, attempt=attempt, budget=config.budget)
    (run_dir / STATUS_FILE).unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "shoestring.launch.cli", "train", *overrides]
    command += [] if config_dir is None else ["--config-dir", str(config_dir)]
    environment = os.environ | {ATTEMPT_VARIABLE: attempt, "TORCH_CPP_LOG_LEVEL": "ERROR"}
    environment.setdefault("OMP_NUM_THREADS", "1")
    reason = "launcher failed"
    try:
        code = subprocess.run(command, env=environment, preexec_fn=die_with_parent, check=False).returncode
        status = read_status(run_dir)
        reason = f"torchrun exited with {code}" if status is None else str(status["reason"])
        return int(str(status["exit_code"])) if status is not None and code == 0 else code or 1
    except KeyboardInterrupt:
        reason = "interrupted"
        return 130
    finally:
        allocation.close(reason)
