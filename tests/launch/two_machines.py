"""Two machines of one launch as real processes on this one: launch/torchrun.sh twice, each in its own session."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from shoestring.tests.launch.real_run import children_of, wait_for_step
from shoestring.tests.launch.small_run import free_port
from shoestring.tests.tree import ROOT
from shoestring.trainer.telemetry.history import read_metrics

SCRIPT = ROOT / "launch" / "torchrun.sh"
OWN = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "GPUS_PER_NODE")
ONE_RANK_EACH = "topology.gpus_per_node=1"


def environment(**variables: str) -> dict[str, str]:
    """Return this process's environment with only these of the variables that launch/torchrun.sh reads."""
    return {key: value for key, value in os.environ.items() if key not in OWN} | {"PYTHON": sys.executable} | variables


@dataclass
class Launch:
    """Two launchers; each prints into its own file."""

    folder: Path
    variables: dict[str, str] = field(default_factory=dict)
    """Further variables; they override those that say which machine it is."""
    machines: dict[int, subprocess.Popen[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._rendezvous = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}

    def start(self, number: int, overrides: Sequence[str], cwd: Path | None = None, **variables: str) -> None:
        """Start machine `number`."""
        own = self._rendezvous | {"NODE_RANK": str(number)} | self.variables | variables
        with (self.folder / f"machine_{number}").open("wb") as output:
            self.machines[number] = subprocess.Popen(
                [SCRIPT, *overrides],
                env=environment(**own),
                cwd=cwd or self.folder,
                stdout=output,
                stderr=output,
                text=True,
                start_new_session=True,
            )

    def start_both(self, overrides: Sequence[str]) -> None:
        for number in (1, 0):
            self.start(number, [*overrides, ONE_RANK_EACH])

    def said(self, number: int) -> str:
        return (self.folder / f"machine_{number}").read_text(errors="replace")

    def everything(self) -> str:
        return "\n".join(f"machine {number}:\n{self.said(number)}" for number in sorted(self.machines))

    def wait_for_step(self, run_dir: Path, step: int) -> None:
        wait_for_step(run_dir, self.machines[0], step)

    def processes(self, number: int) -> list[int]:
        """Return launcher, torchrun and rank of one machine."""
        (torchrun,) = children_of(launcher := self.machines[number].pid)
        return [launcher, torchrun, *children_of(torchrun)]

    def codes(self, seconds: float = 90) -> list[int]:
        """Return exit codes by machine, once all have ended."""
        deadline = time.monotonic() + seconds
        for machine in self.machines.values():
            try:
                machine.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"not ended after {seconds:g} s\n{self.everything()}") from None
        return [self.machines[number].returncode for number in sorted(self.machines)]


@contextmanager
def launch(folder: Path, **variables: str) -> Iterator[Launch]:
    """Yield two machines; none of their processes outlives the context."""
    both = Launch(folder, variables)
    try:
        yield both
    finally:
        for machine in both.machines.values():
            with suppress(OSError):
                os.killpg(machine.pid, signal.SIGKILL)
            machine.wait()


def losses(run_dir: Path) -> list[tuple[int, object, object]]:
    """Return step, loss and gradient norm of every retained step."""
    events = [event for event in read_metrics(run_dir / "metrics.jsonl") if event.kind == "step"]
    return [(event.step, event.values["loss"], event.values["grad_norm"]) for event in events]


def saved_steps(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (run_dir / "checkpoints").glob("step_*"))
