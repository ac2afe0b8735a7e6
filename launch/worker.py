"""One rank of a training run, inside torchrun."""

from __future__ import annotations

import os
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from ..comm.bootstrap import WorkerEnvironment, start_default_group
from ..comm.failure import CollectiveFailed
from ..comm.groups import ProcessGroups
from ..comm.open_groups import open_groups_on
from ..comm.refusal import Problem, Refused
from ..trainer.config import RunConfig
from ..trainer.data.shard_files import DataChanged
from ..trainer.halt import RankFailed, RunFailed, RunHalted
from ..trainer.loop import train
from ..trainer.rank import stages_of
from .attempt import attempt_name
from .compose import to_yaml
from .rank_environment import FLIGHT_RECORDER, applying, computes_on_gpus, make_late, users_choices
from .run_dir import CONFIG_FILE, own, reserve_status, write_status
from .stopping import listen_for_stop

_SECONDS_FOR_OTHERS = 3
"""torchrun ends all ranks of a machine with the first: each shall have said what it waited for, and for whom."""


def run_worker(config: RunConfig, worker: WorkerEnvironment) -> int:
    """Train as the rank that `worker` names; return the exit code.

    A fault of the network or of another rank ends this one with 1. A worker that stops on purpose writes
    `run_status.json` and exits with 0, because torchrun would turn any other code into 1 and might start it again.
    """
    stop_asked = listen_for_stop()
    if worker.rank == 0:
        _own(Path(config.training.run_dir), config)
    if worker.world_size != config.topology.world_size:
        size = f"topology asks for {config.topology.world_size} processes"
        return _stop(config, worker, 2, str(Problem("world size", worker.world_size, f"{size}; start as many")))
    _make_settings(config, worker)
    device = pick_device(config, worker)
    timeout = timedelta(seconds=config.training.collective_timeout_seconds)
    start_default_group(worker, device, timedelta(seconds=config.training.start_timeout_seconds))
    try:
        holders = stages_of(config).all_holders()
        make = open_groups_on(device, worker.rank, timeout)
        groups = ProcessGroups.create(config.topology, worker.rank, timeout, holders, make)
        steps = train(config, groups, device, attempt_name(), stop_asked)
    except Refused as error:
        return _stop(config, worker, 2, str(error))
    except RunFailed as error:
        return _stop(config, worker, 1, str(error))
    except RunHalted as halted:
        return _stop(config, worker, halted.halt, str(halted))
    except CollectiveFailed as error:
        _die(f"shoestring train: {error}")
    except (DataChanged, RankFailed) as error:
        _die(f"shoestring train: rank {worker.rank}: {error}")
    except Exception:
        _die(f"shoestring train: rank {worker.rank}: {traceback.format_exc()}")
    dist.destroy_process_group()
    return _stop(config, worker, 0, f"{steps} steps done")


def _make_settings(config: RunConfig, worker: WorkerEnvironment) -> None:
    """Before CUDA starts: make what a torchrun of one's own has not, and say what differs from our settings."""
    on_gpu = computes_on_gpus(config.training.device, _local_ranks())
    run_dir = Path(config.training.run_dir)
    chosen = applying(run_dir, on_gpu=on_gpu)
    words = [*users_choices(chosen, os.environ), *make_late(chosen, os.environ)]
    if worker.rank != 0:
        return
    if on_gpu:  # rank 0 alone makes the folder: a run directory that others make before it would not be a run's
        (run_dir / FLIGHT_RECORDER).mkdir(exist_ok=True)
    for each in words:
        print(f"shoestring train: {each}", file=sys.stderr, flush=True)


def _local_ranks() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _die(words: str) -> NoReturn:
    """Say why, then leave at once: threads of this process may wait for messages that never come.

    The words come before the connections close, so that they stand before those of the ranks that then miss this one.
    """
    print(words, file=sys.stderr, flush=True)
    sys.stdout.flush()
    time.sleep(_SECONDS_FOR_OTHERS)
    os._exit(1)


def _own(run_dir: Path, config: RunConfig) -> None:
    """Under a torchrun of one's own there is no launcher to leave the configuration."""
    own(run_dir)
    reserve_status(run_dir)
    if not (run_dir / CONFIG_FILE).exists():
        (run_dir / CONFIG_FILE).write_text(to_yaml(config))


def _stop(config: RunConfig, worker: WorkerEnvironment, code: int, reason: str) -> int:
    if worker.rank == 0:
        if code:
            print(f"shoestring train: {reason}", file=sys.stderr, flush=True)
        try:
            write_status(Path(config.training.run_dir), code, reason)
        except OSError as error:  # the run directory is gone: a launcher that reads nothing says so with 1
            print(f"shoestring train: how the run ended cannot be written down: {error}", file=sys.stderr, flush=True)
            return 1
    return 0


def pick_device(config: RunConfig, worker: WorkerEnvironment) -> torch.device:
    """The device of this rank; `auto` takes GPUs where every local process gets one of its own."""
    wanted = config.training.device
    gpus = torch.cuda.device_count()
    local = _local_ranks()
    if wanted == "auto" and 0 < gpus < local and worker.local_rank == 0:
        has = "1 GPU" if gpus == 1 else f"{gpus} GPUs"
        fit = "topology=single" if gpus == 1 else f"topology=single for one of them, or a topology of {gpus} ranks"
        text = f"this machine has {has} for {local} ranks, so they compute on its CPU; to use {has}, write {fit}"
        print(f"shoestring train: {text}", file=sys.stderr, flush=True)
    if not computes_on_gpus(wanted, local):
        return torch.device("cpu")
    device = torch.device("cuda", worker.local_rank)
    torch.cuda.set_device(device)
    # A product that cuBLAS splits along its inner width would add the parts in BF16.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return device
