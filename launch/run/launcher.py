"""Launcher: lock the run directory, record the allocation in the ledger, run torchrun, and return the exit code."""

import os
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from ...comm.errors import ConfigError
from ...trainer.config import RunConfig
from ...trainer.ledger.allocation_journal import AllocationJournal
from ...trainer.ledger.summary import ensure_snapshot
from ...trainer.run.exit import HaltReason
from ..compose import config_to_yaml
from ..console import RESUME_HINT, print_to_stderr, print_to_stdout
from .fingerprint import ATTEMPT_ENV_VAR
from .preflight import budget_blocker, delete_partial_checkpoints, is_run_finished
from .rank_environment import (
    NUMA_BINDING_FLAG,
    SAFE_PATH_ENVIRONMENT,
    NumaSupport,
    applicable_settings,
    build_rank_environment,
    numa_binding_blocker,
    single_node_settings,
    uses_gpus,
)
from .rendezvous import RendezvousError
from .run_dir import (
    CONFIG_FILE,
    STATUS_FILE,
    lock_run_dir,
    read_run_status,
    record_stop,
    reserve_status_space,
    restart_blocker,
    wait_for_run_dir_lock,
    write_run_config,
)
from .signals import (
    FORCE_STOP_SIGNALS,
    LAUNCHER_PID_ENV_VAR,
    STOP_DEBOUNCE_SECONDS,
    STOP_FILE_ENV_VAR,
    STOP_SIGNALS,
    StoppedBeforeStart,
    die_with_parent,
    exclude_ignored_signals,
    handle_signals,
    ignore_late_stop_signals,
)
from .torchrun import RANK_MODULE_ARGUMENTS, TORCHRUN_COMMAND, terminate_torchrun

LAUNCHER_TERMINATION_SIGNALS = (*FORCE_STOP_SIGNALS, signal.SIGHUP)
"""Signals, besides SIGINT, that end a launcher that cannot pass a stop request to ranks."""
_FAILURE = 1
_POLL_SECONDS = 0.5
_SECONDS_ALONE = 5
"""torchrun ends within a second of its last rank if it waits for no other node."""
_SECONDS_FOR_LOCK = 120
"""Slurm kills the remaining processes of a job's previous start 30 s (KillWait) after SIGTERM."""

RendezvousCallback = Callable[[str], None]
"""Function that waits for the other nodes of the named attempt."""


class StoppedBySignal(BaseException):
    """The launcher received a signal to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


def launch_run(
    config: RunConfig, local: "LocalRanks", *, fresh: bool, rendezvous: RendezvousCallback | None = None
) -> int:
    """Run the whole job, or node 0's ranks of it, to the end; return the exit code of `shoestring train`.

    `local` names the ranks of this machine. `rendezvous` waits for the other nodes, and raises `ConfigError` for a
    node that does not match and `RendezvousError` for one that does not come.
    """
    run_dir = Path(config.training.run_dir)
    if os.environ.get("SLURM_RESTART_COUNT", "0") != "0":  # the launcher of the job's previous start may still run
        wait_for_run_dir_lock(run_dir, _SECONDS_FOR_LOCK)
    with lock_run_dir(run_dir, fresh=fresh):
        if is_run_finished(config):
            print_to_stdout(
                f"{run_dir} is finished. Use --fresh to start over, or a larger training.tokens to continue."
            )
            return 0
        ensure_snapshot(run_dir)
        spent = budget_blocker(config)
        if spent is not None:
            print_to_stderr(f"shoestring train: {spent}")
            return HaltReason.OVER_BUDGET
        (run_dir / STATUS_FILE).unlink(missing_ok=True)  # of the previous attempt
        delete_partial_checkpoints(config)
        reserve_status_space(run_dir)
        write_run_config(run_dir, config_to_yaml(config))
        attempt = uuid.uuid4().hex[:12]
        ranks, job = config.topology.world_size, os.environ.get("SLURM_JOB_ID")
        allocation = AllocationJournal(run_dir, ranks=ranks, attempt=attempt, budget=config.budget, job=job)
        reason = "the launcher failed"
        try:
            if rendezvous is not None:
                try:
                    with raise_on_stop_signals(STOP_SIGNALS):
                        rendezvous(attempt)
                except StoppedBySignal as stop:
                    raise StoppedBeforeStart(f"{stop} before all nodes had connected") from stop
                except (ConfigError, RendezvousError) as error:
                    reason = str(error)
                    raise
            try:
                code = run_torchrun(config, local, run_dir, attempt)
                reason = f"a rank died (torchrun exit code {code})"
            except StoppedBySignal as stop:
                code, reason = stop.exit_code, str(stop)
            ignore_late_stop_signals()
            status = read_run_status(run_dir)
            if status is None:
                print_to_stderr(f"shoestring train: {reason}. {RESUME_HINT}")
                return max(code, _FAILURE)
            reason = str(status["reason"])
            return restart_exit_code(run_dir, int(str(status["exit_code"])))
        except StoppedBeforeStart as stop:
            # A signal between two handlers of this launcher counts as any stop without a step.
            reason = str(stop)
            record_stop(run_dir, made_step=False)
            print_to_stderr(f"shoestring train: {reason}")
            return restart_exit_code(run_dir, HaltReason.PREEMPTED)
        finally:
            allocation.close(reason)


def restart_exit_code(run_dir: Path, code: int) -> int:
    """Return a run's exit code, but 1 instead of 75, which requeues it, if a restart would not make progress."""
    blocker = restart_blocker(run_dir)
    if code != HaltReason.PREEMPTED or blocker is None:
        return code
    print_to_stderr(f"shoestring train: {blocker}")
    return _FAILURE


@dataclass(frozen=True)
class LocalRanks:
    """Ranks of one machine."""

    count: int
    torchrun_arguments: tuple[str, ...]
    """Arguments of torchrun that select these ranks."""


def run_torchrun(config: RunConfig, local: LocalRanks, run_dir: Path, attempt: str) -> int:
    """Run this machine's ranks with the configuration in `run_dir` to the end; return torchrun's exit code.

    The first of `STOP_SIGNALS` requests a stop after the current step. Raise `StoppedBySignal` after a second SIGTERM
    or SIGQUIT, after `training.stop_seconds`, after SIGINT (all three end the ranks), or if ranks fail after a request.
    """
    with tempfile.TemporaryDirectory(prefix="shoestring_") as folder:
        stop_file = Path(folder, "stop")
        launch_variables = {
            ATTEMPT_ENV_VAR: attempt,
            LAUNCHER_PID_ENV_VAR: str(os.getpid()),
            STOP_FILE_ENV_VAR: str(stop_file),
        }
        environment = _environment(config, local, launch_variables)
        # Without these, torchrun leaves a log folder behind, and forwards the stop signals as kills to the ranks.
        torchrun = [*_torchrun(config, local), f"--log-dir={folder}/torchrun", "--signals-to-handle=SIGINT"]
        rank = [*RANK_MODULE_ARGUMENTS, "shoestring.launch.run.worker:run_rank_from_config_file"]
        command = [*TORCHRUN_COMMAND, *torchrun, *rank, str(run_dir / CONFIG_FILE)]
        with raise_on_stop_signals():
            process = subprocess.Popen(command, env=environment, preexec_fn=_prepare_torchrun_process)
            try:
                with request_stop_on_signal(stop_file, config.training.stop_seconds) as raise_if_stop_failed:
                    code = _wait(process)
            finally:
                terminate_torchrun(process)
            raise_if_stop_failed(code)
        return code


def _environment(config: RunConfig, local: LocalRanks, launch_variables: Mapping[str, str]) -> dict[str, str]:
    on_gpu = uses_gpus(config.training.device, local.count)
    settings = applicable_settings(Path(config.training.run_dir), on_gpu=on_gpu)
    if local.count == config.topology.world_size:
        settings += [setting for setting in single_node_settings() if on_gpu or not setting.gpu_only]
    return build_rank_environment({**SAFE_PATH_ENVIRONMENT, **launch_variables}, settings)


def _torchrun(config: RunConfig, local: LocalRanks) -> tuple[str, ...]:
    on_gpu = uses_gpus(config.training.device, local.count)
    can_bind = numa_binding_blocker(NumaSupport.detect(), on_gpu=on_gpu) is None
    return (*local.torchrun_arguments, NUMA_BINDING_FLAG) if can_bind else local.torchrun_arguments


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Wait for torchrun; terminate it a few seconds after its last rank has ended.

    torchrun waits up to five minutes for the torchrun of every other node, and one that was killed never answers.
    """
    alone_since: float | None = None
    has_started = False
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(_POLL_SECONDS)
        is_alone = not _has_children(process.pid)
        has_started = has_started or not is_alone
        now = time.monotonic()
        alone_since = (alone_since or now) if is_alone and has_started else None
        if alone_since is not None and now - alone_since > _SECONDS_ALONE:
            terminate_torchrun(process)
            return 0


def _has_children(pid: int) -> bool:
    """Return whether a process has children; True if the kernel does not tell."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        return any((thread / "children").read_text().strip() for thread in threads)
    except OSError:
        return True


def _prepare_torchrun_process() -> None:
    """Set up torchrun's process between fork and exec."""
    die_with_parent()
    # Slurm and systemd send stop signals to every process of a job. torchrun and its ranks inherit that they are
    # blocked: torchrun turns them into the stop file, and a rank unblocks them once its handlers are installed.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell ignores SIGINT in the background processes of a script


@contextmanager
def request_stop_on_signal(stop_file: Path, seconds: float) -> Iterator[Callable[[int], None]]:
    """Create `stop_file`, a stop request to the ranks, at the first stop signal.

    Raise `StoppedBySignal` at a forcing signal after it, or after `seconds`. Yield a function that raises it for a
    non-zero exit code of the ranks, if a stop was requested.
    """
    requested_by: list[int] = []
    requested_at = 0.0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal requested_at
        if requested_by:
            if number == signal.SIGALRM:
                raise StoppedBySignal(requested_by[0])
            # SIGUSR1 and SIGHUP only request a stop, however often they come.
            if number in FORCE_STOP_SIGNALS and time.monotonic() - requested_at > STOP_DEBOUNCE_SECONDS:
                raise StoppedBySignal(number)
            return
        requested_by.append(number)
        requested_at = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, seconds)
        stop_file.touch()
        if os.environ.get("SLURM_NODEID", "0") == "0":  # all nodes of a Slurm job write into one file
            text = "stopping after this step, with a checkpoint; a second SIGTERM stops immediately"
            print_to_stderr(f"shoestring train: {signal.Signals(number).name}: {text}")

    def raise_if_failed(code: int) -> None:
        if code and requested_by:
            raise StoppedBySignal(requested_by[0])

    with handle_signals((*exclude_ignored_signals(STOP_SIGNALS), signal.SIGALRM), handle):
        try:
            yield raise_if_failed
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def raise_on_stop_signals(numbers: Iterable[signal.Signals] = LAUNCHER_TERMINATION_SIGNALS) -> Iterator[None]:
    """Raise `StoppedBySignal` at SIGINT and each of `numbers`, so that the ledger is closed before this process ends.

    Further signals are ignored after the first, so that none interrupts the closing.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise StoppedBySignal(number)

    handled = (*exclude_ignored_signals(numbers), signal.SIGINT)
    with handle_signals(handled, stop):
        try:
            yield
        except StoppedBySignal:
            for number in handled:
                signal.signal(number, signal.SIG_IGN)
            raise
