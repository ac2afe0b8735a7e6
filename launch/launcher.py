"""The parent of a run's ranks: it holds the directory and the GPUs in the ledger, and says how the run ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from ..trainer.budget.allocation import Allocation
from ..trainer.config import RunConfig
from ..trainer.halt import Halt
from .attempt import ATTEMPT_VARIABLE
from .compose import to_yaml
from .numa import BINDING, NumaFacts, why_not_bound
from .orphan import LAUNCHER_VARIABLE, die_with_parent
from .preflight import is_finished, make_room, spent_budget
from .rank_environment import applying, computes_on_gpus, rank_environment
from .run_dir import CONFIG_FILE, claimed, clear_status, read_status, reserve_status
from .stopping import ASKING_SIGNALS, STOP_FILE_VARIABLE
from .torchrun import TORCHRUN, end

SAME_REQUEST_SECONDS = 2


class Stopped(BaseException):
    """A signal asked the launcher to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


def launch(config: RunConfig, local: LocalRanks, arguments: Sequence[str], *, fresh: bool) -> int:
    """Run the whole job, or machine 0's share of it, to its end; return the exit code of `shoestring train`.

    `local` says which ranks this machine runs, `arguments` are those of `shoestring train`.
    """
    run_dir = Path(config.training.run_dir)
    with claimed(run_dir, fresh=fresh):
        if is_finished(config):
            print(f"{run_dir} is finished. --fresh starts over; a larger training.tokens goes on.")
            return 0
        spent = spent_budget(config)
        if spent is not None:
            print(f"shoestring train: {spent}", file=sys.stderr)
            return Halt.OVER_BUDGET
        clear_status(run_dir)
        make_room(config)
        reserve_status(run_dir)
        (run_dir / CONFIG_FILE).write_text(to_yaml(config))
        attempt = uuid.uuid4().hex[:12]
        allocation = Allocation(
            run_dir,
            ranks=config.topology.world_size,
            attempt=attempt,
            budget=config.budget,
            job=os.environ.get("SLURM_JOB_ID"),
        )
        reason = "the launcher failed"
        try:
            try:
                code = run_torchrun(config, local, arguments, attempt)
                reason = f"a rank died, torchrun exited with {code}"
            except Stopped as stop:
                code, reason = stop.exit_code, str(stop)
            status = read_status(run_dir)
            if status is not None:
                reason = str(status["reason"])
                return int(str(status["exit_code"]))
            print(f"shoestring train: {reason}; the same command goes on from the last checkpoint", file=sys.stderr)
            return code or 1
        finally:
            allocation.close(reason)


@dataclass(frozen=True)
class LocalRanks:
    """The ranks of one machine."""

    count: int
    torchrun: tuple[str, ...]
    """Arguments of torchrun that say which they are."""


def run_torchrun(config: RunConfig, local: LocalRanks, arguments: Sequence[str], attempt: str) -> int:
    """Run this machine's ranks to their end and return torchrun's exit code.

    The first SIGTERM or SIGUSR1 asks the ranks to stop after their step. A second SIGTERM, no end within
    `training.stop_seconds`, or SIGINT ends them and then raises `Stopped`; so does a failure of ranks that were asked.
    """
    with tempfile.TemporaryDirectory() as folder:
        stop_file = Path(folder, "stop")
        own = {ATTEMPT_VARIABLE: attempt, LAUNCHER_VARIABLE: str(os.getpid()), STOP_FILE_VARIABLE: str(stop_file)}
        environment = _environment(config, local, own)
        return _run(
            _torchrun(config, local), arguments, environment, StopRequest(stop_file, config.training.stop_seconds)
        )


def _environment(config: RunConfig, local: LocalRanks, own: Mapping[str, str]) -> dict[str, str]:
    on_gpu = computes_on_gpus(config.training.device, local.count)
    return rank_environment(own, applying(Path(config.training.run_dir), on_gpu=on_gpu))


def _torchrun(config: RunConfig, local: LocalRanks) -> tuple[str, ...]:
    on_gpu = computes_on_gpus(config.training.device, local.count)
    bound = why_not_bound(NumaFacts.here(), on_gpu=on_gpu) is None
    return (*local.torchrun, BINDING) if bound else local.torchrun


def _run(torchrun: Sequence[str], arguments: Sequence[str], environment: dict[str, str], request: StopRequest) -> int:
    command = [*TORCHRUN, *torchrun, "-m", "shoestring.launch.cli", "train", *arguments]
    with stop_signals_raise():
        process = subprocess.Popen(command, env=environment, preexec_fn=_become_torchrun)
        try:
            with request.on_first_signal():
                code = process.wait()
        finally:
            end(process)
        request.raise_if_failed(code)
    return code


def _become_torchrun() -> None:
    """Between fork and exec. Slurm sends SIGUSR1 to every process of a job: to torchrun it must mean nothing.

    Ranks inherit that until they listen. SIGINT is ignored in what a script starts in the background.
    """
    die_with_parent()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class StopRequest:
    """The launcher's wish that its ranks stop, said by `stop_file`."""

    def __init__(self, stop_file: Path, seconds: float) -> None:
        self._stop_file = stop_file
        self._seconds = seconds
        self._asked: int | None = None
        self._asked_at = 0.0

    @contextmanager
    def on_first_signal(self) -> Iterator[None]:
        """The first asking signal asks; a later SIGTERM, or no end of the context in time, raises `Stopped`."""
        former = {number: signal.signal(number, self._hear) for number in (*ASKING_SIGNALS, signal.SIGALRM)}
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in former.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._asked is not None:
            if number == signal.SIGALRM:
                raise Stopped(self._asked)
            # Slurm may signal a process twice, by itself and in its group; SIGUSR1 never means more than a request.
            if number == signal.SIGTERM and time.monotonic() - self._asked_at > SAME_REQUEST_SECONDS:
                raise Stopped(number)
            return
        self._asked, self._asked_at = number, time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, self._seconds)
        self._stop_file.touch()
        text = "the run stops after this step, with a checkpoint; a second SIGTERM ends it at once"
        print(f"shoestring train: {signal.Signals(number).name}: {text}", file=sys.stderr, flush=True)

    def raise_if_failed(self, code: int) -> None:
        """Ranks that were asked to stop and failed have stopped, but not as they were asked to."""
        if code and self._asked is not None:
            raise Stopped(self._asked)


@contextmanager
def stop_signals_raise() -> Iterator[None]:
    """SIGTERM (Slurm, `docker stop`) and SIGINT become `Stopped`, so that the ledger is closed.

    Once one has, this process is about to end, and further ones are ignored: none may cut the closing short.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    former = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except Stopped:
        former = dict.fromkeys(former, signal.SIG_IGN)
        raise
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
