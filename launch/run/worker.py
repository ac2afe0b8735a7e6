"""One rank of a training run, inside torchrun."""

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from ...comm.bootstrap import TorchrunEnvironment, connect_rendezvous_store, init_default_process_group
from ...comm.errors import CollectiveError, ConfigError, Problem
from ...comm.rank_consistency import RankMismatchError, verify_ranks_match
from ...comm.watchdog import Watchdog
from ...trainer.build import build_stage_layout
from ...trainer.config import RunConfig
from ...trainer.data.shard_files import DataChanged
from ...trainer.loop import train
from ...trainer.run.exit import HaltReason, RankFailed, RunFailed, RunHalted
from ..compose import config_to_yaml, read_config
from ..console import print_to_stderr
from .fingerprint import attempt_name, data_digest, run_fingerprint
from .on_ranks import RankContext, pick_device
from .rank_environment import (
    FLIGHT_RECORDER_DIR,
    applicable_settings,
    apply_late_settings,
    describe_user_overrides,
    uses_gpus,
)
from .rendezvous import open_rendezvous_store
from .run_dir import (
    attempt_exit_code,
    create_run_dir,
    is_run_dir,
    lock_run_dir,
    record_attempt_exit,
    record_stop,
    reserve_status_space,
    write_run_config,
    write_run_status,
)
from .signals import LAUNCHER_PID_ENV_VAR, StoppedBeforeStart, install_stop_handlers

_CONFIG_ERROR = 2
_SECONDS_FOR_OTHERS = 3
"""Delay before a failed rank exits: torchrun then ends the other ranks, which first print what they waited for."""


def run_rank_from_config_file(path: Path) -> int:
    """Train as the rank that torchrun's variables name, with the configuration at `path`.

    Return the exit code; it is 0 if the launcher reads the true one from `run_status.json`.
    """
    worker = TorchrunEnvironment.read()
    assert worker is not None
    try:
        config = read_config(path)
    except ConfigError as error:  # a variable of the environment that is not set on every node
        return _report_config_error(path.parent, worker.rank, error)
    return run_rank(config, worker)


def run_rank(config: RunConfig, worker: TorchrunEnvironment) -> int:
    """Train as the rank that `worker` names; return the exit code.

    A failure of the network or of another rank ends this rank with 1. A rank that stops on purpose writes
    `run_status.json` and exits with 0 under the launcher, which reads the file, since torchrun turns any other code
    into 1. Without the launcher it exits with the true code, and every rank prints the reason.
    """
    stop_requested = install_stop_handlers(config.training.stop_seconds)
    code = attempt_exit_code(Path(config.training.run_dir), attempt_name())
    if code is not None and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return code  # the user's torchrun with --max-restarts restarts ranks that ended on purpose
    if worker.world_size != config.topology.world_size:
        problem = Problem("world size", worker.world_size, f"topology needs {config.topology.world_size} processes")
        return _report_config_error(Path(config.training.run_dir), worker.rank, ConfigError([problem]), owns=False)
    with _hold_run_dir(config) if worker.rank == 0 else nullcontext():
        return _run(config, worker, stop_requested)


def _run(config: RunConfig, worker: TorchrunEnvironment, stop_requested: Callable[[], bool]) -> int:
    """Connect to the other ranks and train with them; return the exit code."""
    try:
        device, watchdog = _connect_ranks(config, worker, stop_requested)
    except StoppedBeforeStart as stopped:
        if worker.rank == 0:
            record_stop(Path(config.training.run_dir), made_step=False)
        _exit(_stop(config, worker, HaltReason.PREEMPTED, str(stopped)))
    except ConfigError as error:
        return _report_config_error(Path(config.training.run_dir), worker.rank, error)
    timeout = timedelta(seconds=config.training.collective_timeout_seconds)
    try:
        rank = RankContext(**vars(worker), device=device, timeout=timeout)
        groups = rank.open_groups(config.topology, build_stage_layout(config).replica_pp_groups(), watchdog)
        steps = train(config, groups, device, attempt_name(), stop_requested)
    except ConfigError as error:
        return _stop(config, worker, _CONFIG_ERROR, str(error))
    except RunFailed as error:
        return _stop(config, worker, 1, str(error))
    except RunHalted as halted:
        if worker.rank == 0:
            record_stop(Path(config.training.run_dir), made_step=halted.made_progress)
        code = _stop(config, worker, halted.reason, str(halted))
        dist.destroy_process_group()  # all ranks halt after the same step
        return code
    except CollectiveError as error:
        _die(f"shoestring train: {error}")
    except (DataChanged, RankFailed) as error:
        _die(f"shoestring train: rank {worker.rank}: {error}")
    except Exception:
        _die(f"shoestring train: rank {worker.rank}: {traceback.format_exc()}")
    dist.destroy_process_group()
    return _stop(config, worker, 0, f"{steps} steps done")


def _connect_ranks(
    config: RunConfig, worker: TorchrunEnvironment, stop_requested: Callable[[], bool]
) -> tuple[torch.device, Watchdog | None]:
    """Connect to the other ranks, compare fingerprints, and open the default group.

    Return this rank's device, and on a GPU the watchdog of its calls; gloo's calls end at their time limit. Nodes of
    the launcher have connected before; ranks of the user's torchrun wait for each other here.
    """
    limit = timedelta(seconds=config.training.start_timeout_seconds)
    key = "start_timeout_seconds" if LAUNCHER_PID_ENV_VAR in os.environ else "rendezvous_timeout_seconds"
    try:
        if LAUNCHER_PID_ENV_VAR in os.environ:
            store = connect_rendezvous_store(worker, limit)
        else:
            store = open_rendezvous_store(worker, config.training.rendezvous_timeout_seconds, stop_requested)
            store.set_timeout(limit)
        key = "start_timeout_seconds"
        verify_ranks_match(store, worker.rank, worker.world_size, run_fingerprint(config, data_digest(config)))
        _apply_settings(config, worker)
        print_unused_gpus(config.training.device, worker)
        device = pick_device(config.training.device, worker)
        watchdog = None
        if device.type == "cuda":  # with the limit for startup until the engine has connected
            watchdog = Watchdog(worker.rank, limit, Path(config.training.run_dir) / FLIGHT_RECORDER_DIR)
            watchdog.start()
        with nullcontext() if watchdog is None else watchdog.watch_call("opening NCCL", range(worker.world_size)):
            init_default_process_group(worker, device, limit, store)
    except (dist.DistError, OSError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        seconds = getattr(config.training, key)
        what = f"could not connect to the other {worker.world_size - 1} ranks at {where} within {seconds:g} s"
        _die(f"shoestring train: rank {worker.rank} {what} (training.{key}): {error}")
    return device, watchdog


def _report_config_error(run_dir: Path, rank: int, error: ConfigError, *, owns: bool = True) -> int:
    """Print `error` and write it as the run's status; return 2, at which torchrun ends the ranks that wait for it.

    The status is not written if neither a launcher nor rank 0 (`owns`) holds `run_dir`: another run may be using it.
    """
    if (LAUNCHER_PID_ENV_VAR in os.environ or (owns and rank == 0)) and is_run_dir(run_dir):
        write_run_status(run_dir, _CONFIG_ERROR, str(error))
    if rank == 0 or LAUNCHER_PID_ENV_VAR not in os.environ or not isinstance(error, RankMismatchError):
        _print(rank, str(error))
    return _CONFIG_ERROR


def _apply_settings(config: RunConfig, worker: TorchrunEnvironment) -> None:
    """Set the variables that the user's torchrun has not set, before CUDA starts; rank 0 prints the differences."""
    on_gpu = uses_gpus(config.training.device, worker.local_world_size)
    run_dir = Path(config.training.run_dir)
    chosen = applicable_settings(run_dir, on_gpu=on_gpu)
    messages = [*describe_user_overrides(chosen, os.environ), *apply_late_settings(chosen, os.environ)]
    if worker.rank != 0:
        return
    if on_gpu:  # only rank 0, which has written the marker first: without it the directory would not count as a run's
        (run_dir / FLIGHT_RECORDER_DIR).mkdir(exist_ok=True)
    for message in messages:
        print_to_stderr(f"shoestring train: {message}")


def _die(message: str) -> NoReturn:
    """Print `message`, then exit with 1 after a delay, so that it precedes the errors of ranks that lose this one."""
    print_to_stderr(message)
    _exit(1, _SECONDS_FOR_OTHERS)


def _exit(code: int, seconds: float = 0) -> NoReturn:
    """Exit after `seconds` without finalization, since threads of this process may wait for messages forever."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    time.sleep(seconds)
    os._exit(code)


@contextmanager
def _hold_run_dir(config: RunConfig) -> Iterator[None]:
    """Do the launcher's work on rank 0 under the user's torchrun: lock the run directory and write the configuration.

    Raises `ConfigError`, before anything is written, if another run is active in the directory.
    """
    run_dir, launched = Path(config.training.run_dir), LAUNCHER_PID_ENV_VAR in os.environ
    with nullcontext() if launched else lock_run_dir(run_dir, fresh=False):
        create_run_dir(run_dir)
        reserve_status_space(run_dir)
        if not launched:
            write_run_config(run_dir, config_to_yaml(config))
        yield


def _print(rank: int, text: str) -> None:
    """Print a message of this rank; rank 0 speaks for the run."""
    print_to_stderr(f"shoestring train: {text}" if rank == 0 else f"shoestring train: rank {rank}: {text}")


def _stop(config: RunConfig, worker: TorchrunEnvironment, code: int, reason: str) -> int:
    launched, run_dir = LAUNCHER_PID_ENV_VAR in os.environ, Path(config.training.run_dir)
    if code and (worker.rank == 0 or not launched):
        _print(worker.rank, reason)
    if worker.rank == 0:
        try:
            write_run_status(run_dir, code, reason)
            if not launched:
                record_attempt_exit(run_dir, attempt_name(), code)
        except OSError as error:  # the run directory is gone: a launcher that reads no status exits with 1
            print_to_stderr(f"shoestring train: the run status cannot be written: {error}")
            return 1 if launched else code
    return 0 if launched else code


def print_unused_gpus(wanted: str, worker: TorchrunEnvironment) -> None:
    """Print on one rank of each machine if `auto` leaves GPUs unused, since there is not one for each rank."""
    gpus, local = torch.cuda.device_count(), worker.local_world_size
    if wanted == "auto" and 0 < gpus < local and worker.local_rank == 0:
        has = "1 GPU" if gpus == 1 else f"{gpus} GPUs"
        choice = "topology=single" if gpus == 1 else f"topology=single for one of them, or a topology of {gpus} ranks"
        text = f"this machine has {has} for {local} ranks, so they compute on the CPU; to use {has}, write {choice}"
        print_to_stderr(f"shoestring train: {text}")
