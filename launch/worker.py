"""One rank of a training run, inside torchrun."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ..comm.bootstrap import WorkerEnvironment, start_default_group
from ..comm.groups import ProcessGroups
from ..comm.refusal import Problem, Refused
from ..trainer.config import RunConfig
from ..trainer.loop import RunFailed, train
from .run_dir import write_status

ATTEMPT_VARIABLE = "SHOESTRING_ATTEMPT"
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: between fork and exec is no place for it


def run_worker(config: RunConfig, worker: WorkerEnvironment) -> int:
    """Train as the rank that `worker` names; return the exit code.

    A worker that stops on purpose writes `run_status.json` and exits with 0, because torchrun would turn any other code
    into 1 and might start it again.
    """
    die_with_parent()
    if worker.world_size != config.topology.world_size:
        size = f"topology asks for {config.topology.world_size} processes"
        return _stop(config, worker, 2, str(Problem("world size", worker.world_size, f"{size}; start as many")))
    device = pick_device(config, worker)
    timeout = timedelta(seconds=config.training.collective_timeout_seconds)
    start_default_group(worker, device, timeout)
    try:
        groups = ProcessGroups.create(config.topology, worker.rank, timeout)
        attempt = os.environ.get(ATTEMPT_VARIABLE) or os.environ.get("TORCHELASTIC_RUN_ID", "none")
        steps = train(config, groups, device, attempt)
    except Refused as error:
        return _stop(config, worker, 2, str(error))
    except RunFailed as error:
        return _stop(config, worker, 1, str(error))
    finally:
        dist.destroy_process_group()
    return _stop(config, worker, 0, f"{steps} steps done")


def _stop(config: RunConfig, worker: WorkerEnvironment, code: int, reason: str) -> int:
    if worker.rank == 0:
        write_status(Path(config.training.run_dir), code, reason)
        if code:
            print(f"shoestring train: {reason}", file=sys.stderr, flush=True)
    return 0


def pick_device(config: RunConfig, worker: WorkerEnvironment) -> torch.device:
    """The device of this rank; `auto` takes GPUs where every local process gets one of its own."""
    wanted = config.training.device
    gpus = torch.cuda.device_count()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if wanted == "cpu" or (wanted == "auto" and gpus < local):
        return torch.device("cpu")
    device = torch.device("cuda", worker.local_rank)
    torch.cuda.set_device(device)
    return device


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies: a killed launcher leaves no ranks (Linux only)."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
