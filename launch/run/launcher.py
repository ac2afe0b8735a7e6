"""The parent of a run's ranks: it holds the directory and the GPUs in the ledger, and says how the run ended."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from ..console import print_to_stderr, print_to_stdout
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
from .restart_policy import record_stop, restart_blocker
from .run_dir import (
    CONFIG_FILE,
    clear_run_status,
    lock_run_dir,
    read_run_status,
    reserve_status_space,
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
    ignore_late_stop_signals,
)
from .torchrun import TORCHRUN_COMMAND, terminate_torchrun

LAUNCHER_TERMINATION_SIGNALS = (*FORCE_STOP_SIGNALS, signal.SIGHUP)
"""Signals, beside SIGINT, that end a launcher whose ranks cannot be asked."""
_FAULT = 1
_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_ALONE = 5
"""torchrun itself ends within a second of its last rank where no other machine is waited for."""
_SECONDS_FOR_LOCK = 120
"""Slurm kills what is left of a job's last start 30 s (KillWait) after it has asked."""

RendezvousCallback = Callable[[str], None]
"""Waits for the other machines of the launch that is named."""


class StoppedBySignal(BaseException):
    """A signal asked the launcher to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


def launch_run(
    config: RunConfig, local: LocalRanks, *, fresh: bool, rendezvous: RendezvousCallback | None = None
) -> int:
    """Run the whole job, or machine 0's share of it, to its end; return the exit code of `shoestring train`.

    `local` says which ranks this machine runs; `meet` waits for the others, and raises `ConfigError` for one that
    does not fit.
    """
    run_dir = Path(config.training.run_dir)
    if os.environ.get("SLURM_RESTART_COUNT", "0") != "0":  # the launcher of the job's last start may still be ending
        wait_for_run_dir_lock(run_dir, _SECONDS_FOR_LOCK)
    with lock_run_dir(run_dir, fresh=fresh):
        if is_run_finished(config):
            print_to_stdout(f"{run_dir} is finished. --fresh starts over; a larger training.tokens goes on.")
            return 0
        ensure_snapshot(run_dir)
        spent = budget_blocker(config)
        if spent is not None:
            print_to_stderr(f"shoestring train: {spent}")
            return HaltReason.OVER_BUDGET
        clear_run_status(run_dir)
        delete_partial_checkpoints(config)
        reserve_status_space(run_dir)
        write_run_config(run_dir, config_to_yaml(config))
        attempt = uuid.uuid4().hex[:12]
        allocation = AllocationJournal(
            run_dir,
            ranks=config.topology.world_size,
            attempt=attempt,
            budget=config.budget,
            job=os.environ.get("SLURM_JOB_ID"),
        )
        reason = "the launcher failed"
        try:
            if rendezvous is not None:
                try:
                    with raise_on_stop_signals(STOP_SIGNALS):
                        rendezvous(attempt)
                except StoppedBySignal as stop:
                    reason = f"{stop} before the machines had met"
                    record_stop(run_dir, made_step=False)
                    print_to_stderr(f"shoestring train: {reason}")
                    return preemption_exit_code(run_dir)
                except (ConfigError, RendezvousError) as error:
                    reason = str(error)
                    raise
            try:
                code = run_torchrun(config, local, run_dir, attempt)
                reason = f"a rank died, torchrun exited with {code}"
            except StoppedBySignal as stop:
                code, reason = stop.exit_code, str(stop)
            ignore_late_stop_signals()
            status = read_run_status(run_dir)
            if status is not None:
                reason = str(status["reason"])
                found = int(str(status["exit_code"]))
                return preemption_exit_code(run_dir) if found == HaltReason.PREEMPTED else found
            print_to_stderr(f"shoestring train: {reason}; the same command goes on from the last checkpoint")
            return code if code > _FAULT else _FAULT
        except (
            StoppedBeforeStart
        ) as stop:  # between two handlers of this launcher: counted, as any stop without a step is
            reason = f"stopped by {stop}"
            record_stop(run_dir, made_step=False)
            print_to_stderr(f"shoestring train: {reason}")
            return preemption_exit_code(run_dir)
        finally:
            allocation.close(reason)


def preemption_exit_code(run_dir: Path) -> int:
    """The exit code of a run that was asked to stop: not the one that has it started again, if that leads nowhere."""
    words = restart_blocker(run_dir)
    if words is None:
        return HaltReason.PREEMPTED
    print_to_stderr(f"shoestring train: {words}")
    return _FAULT


@dataclass(frozen=True)
class LocalRanks:
    """The ranks of one machine."""

    count: int
    torchrun_arguments: tuple[str, ...]
    """Arguments of torchrun that say which they are."""


def run_torchrun(config: RunConfig, local: LocalRanks, run_dir: Path, attempt: str) -> int:
    """Run this machine's ranks, by the configuration in `run_dir`, to their end; return torchrun's exit code.

    The first of `STOP_SIGNALS` asks the ranks to stop after their step. A second SIGTERM or SIGQUIT, no end within
    `training.stop_seconds`, or SIGINT ends them and then raises `StoppedBySignal`; so does a failure of ranks that were asked.
    """
    with tempfile.TemporaryDirectory(prefix="shoestring_") as folder:
        stop_file = Path(folder, "stop")
        own = {ATTEMPT_ENV_VAR: attempt, LAUNCHER_PID_ENV_VAR: str(os.getpid()), STOP_FILE_ENV_VAR: str(stop_file)}
        environment = _environment(config, local, own)
        # torchrun would leave a folder of its own behind, and pass on signals that the ranks are asked with.
        torchrun = [*_torchrun(config, local), f"--log-dir={folder}/torchrun", "--signals-to-handle=SIGINT"]
        command = [*TORCHRUN_COMMAND, *torchrun, "-m", "shoestring.launch.run.start_rank", str(run_dir / CONFIG_FILE)]
        return _run(command, environment, StopRequest(stop_file, config.training.stop_seconds))


def _environment(config: RunConfig, local: LocalRanks, own: Mapping[str, str]) -> dict[str, str]:
    on_gpu = uses_gpus(config.training.device, local.count)
    settings = applicable_settings(Path(config.training.run_dir), on_gpu=on_gpu)
    if local.count == config.topology.world_size:
        settings += [setting for setting in single_node_settings() if on_gpu or not setting.gpu_only]
    return build_rank_environment({**SAFE_PATH_ENVIRONMENT, **own}, settings)


def _torchrun(config: RunConfig, local: LocalRanks) -> tuple[str, ...]:
    on_gpu = uses_gpus(config.training.device, local.count)
    bound = numa_binding_blocker(NumaSupport.detect(), on_gpu=on_gpu) is None
    return (*local.torchrun_arguments, NUMA_BINDING_FLAG) if bound else local.torchrun_arguments


def _run(command: Sequence[str], environment: dict[str, str], request: StopRequest) -> int:
    with raise_on_stop_signals():
        process = subprocess.Popen(command, env=environment, preexec_fn=_become_torchrun)
        try:
            with request.request_stop_on_signal():
                code = _wait(process)
        finally:
            terminate_torchrun(process)
        request.raise_if_stop_failed(code)
    return code


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Until torchrun ends; a few seconds after its last rank has, end it.

    torchrun waits for that of every other machine, up to five minutes, and one that was killed never comes.
    """
    alone_since: float | None = None
    has_started = False
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(_SECONDS_BETWEEN_LOOKS)
        is_alone = not _has_children(process.pid)
        has_started = has_started or not is_alone
        now = time.monotonic()
        alone_since = (alone_since or now) if is_alone and has_started else None
        if alone_since is not None and now - alone_since > _SECONDS_ALONE:
            terminate_torchrun(process)
            return 0


def _has_children(pid: int) -> bool:
    """Whether the process has any; True where the kernel does not say."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        return any((thread / "children").read_text().strip() for thread in threads)
    except OSError:
        return True


def _become_torchrun() -> None:
    """Between fork and exec. Slurm and systemd send a request to stop to every process of a job.

    torchrun and the ranks it starts inherit that these are blocked: the former turns them into the stop file, the
    latter get them once they listen. SIGINT is ignored in what a script starts in the background.
    """
    die_with_parent()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class StopRequest:
    """The launcher's wish that its ranks stop, said by `stop_file`."""

    def __init__(self, stop_file: Path, seconds: float) -> None:
        self._stop_file = stop_file
        self._seconds = seconds
        self._asked: int | None = None
        self._asked_at = 0.0

    @contextmanager
    def request_stop_on_signal(self) -> Iterator[None]:
        """The first asking signal asks; one that ends, or no end of the context in time, raises `StoppedBySignal`."""
        heard = (*exclude_ignored_signals(STOP_SIGNALS), signal.SIGALRM)
        former = {number: signal.signal(number, self._hear) for number in heard}
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in former.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._asked is not None:
            if number == signal.SIGALRM:
                raise StoppedBySignal(self._asked)
            # SIGUSR1 never means more than a request.
            if number in FORCE_STOP_SIGNALS and time.monotonic() - self._asked_at > STOP_DEBOUNCE_SECONDS:
                raise StoppedBySignal(number)
            return
        self._asked, self._asked_at = number, time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, self._seconds)
        self._stop_file.touch()
        if os.environ.get("SLURM_NODEID", "0") == "0":  # all machines of a job write into one file
            text = "the run stops after this step, with a checkpoint; a second SIGTERM ends it at once"
            print_to_stderr(f"shoestring train: {signal.Signals(number).name}: {text}")

    def raise_if_stop_failed(self, code: int) -> None:
        """Ranks that were asked to stop and failed have stopped, but not as they were asked to."""
        if code and self._asked is not None:
            raise StoppedBySignal(self._asked)


@contextmanager
def raise_on_stop_signals(numbers: Iterable[signal.Signals] = LAUNCHER_TERMINATION_SIGNALS) -> Iterator[None]:
    """SIGTERM (Slurm, `docker stop`) and its like become `StoppedBySignal`, so that the ledger is closed; SIGINT always does.

    Once one has, this process is about to end, and further ones are ignored: none may cut the closing short.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise StoppedBySignal(number)

    former = {number: signal.signal(number, stop) for number in (*exclude_ignored_signals(numbers), signal.SIGINT)}
    try:
        yield
    except StoppedBySignal:
        former = dict.fromkeys(former, signal.SIG_IGN)
        raise
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
