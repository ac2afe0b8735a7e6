"""The parent of a run's ranks: it holds the directory and the GPUs in the ledger, and says how the run ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from ..trainer.budget.allocation import Allocation
from ..trainer.config import RunConfig
from .compose import to_yaml
from .orphan import LAUNCHER_VARIABLE, die_with_parent
from .preflight import is_finished
from .run_dir import CONFIG_FILE, claimed, clear_status, read_status
from .worker import ATTEMPT_VARIABLE

_SECONDS_TO_END = 30


class Stopped(BaseException):
    """A signal asked the launcher to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


def launch(config: RunConfig, torchrun: Sequence[str], arguments: Sequence[str], *, fresh: bool) -> int:
    """Run the whole job, or machine 0's share of it, to its end; return the exit code of `shoestring train`.

    `torchrun` says which ranks this machine runs, `arguments` are those of `shoestring train`.
    """
    run_dir = Path(config.training.run_dir)
    with claimed(run_dir, fresh=fresh):
        if is_finished(config):
            print(f"{run_dir} is finished. --fresh starts over; a larger training.tokens goes on.")
            return 0
        clear_status(run_dir)
        (run_dir / CONFIG_FILE).write_text(to_yaml(config))
        attempt = uuid.uuid4().hex[:12]
        allocation = Allocation(run_dir, ranks=config.topology.world_size, attempt=attempt, budget=config.budget)
        reason = "the launcher failed"
        try:
            code = run_torchrun(torchrun, arguments, attempt)
            status = read_status(run_dir)
            if status is not None:
                reason = str(status["reason"])
                return int(str(status["exit_code"]))
            reason = f"a rank died, torchrun exited with {code}"
            print(f"shoestring train: {reason}; the same command goes on from the last checkpoint", file=sys.stderr)
            return code or 1
        except Stopped as stop:
            reason = str(stop)
            print(f"shoestring train: {reason}; the same command goes on from the last checkpoint", file=sys.stderr)
            return stop.exit_code
        finally:
            allocation.close(reason)


def run_torchrun(torchrun: Sequence[str], arguments: Sequence[str], attempt: str) -> int:
    """Run this machine's ranks to their end and return torchrun's exit code.

    SIGTERM and SIGINT end them first and then raise `Stopped`.
    """
    environment = os.environ | {ATTEMPT_VARIABLE: attempt, LAUNCHER_VARIABLE: str(os.getpid())}
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    environment.setdefault("OMP_NUM_THREADS", "1")  # with a pool each, ranks of one CPU spend their time spinning
    command = [sys.executable, "-m", "torch.distributed.run", *torchrun]
    command += ["-m", "shoestring.launch.cli", "train", *arguments]
    with stop_signals_raise():
        process = subprocess.Popen(command, env=environment, preexec_fn=die_with_parent)
        try:
            return process.wait()
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """torchrun passes SIGTERM on to its ranks; one that does not end takes them along by the death of their parent."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def stop_signals_raise() -> Iterator[None]:
    """SIGTERM (Slurm, `docker stop`) and SIGINT become `Stopped`, so that the ledger is closed."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    former = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
