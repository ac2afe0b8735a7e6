"""Small runs into which faults are injected, and the comparison of each with an undisturbed run."""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from shoestring.launch.compose import compose_run_config
from shoestring.trainer.data.preparation.prepare import prepare_corpus
from shoestring.trainer.ledger.summary import LedgerReader
from shoestring.trainer.telemetry.events import StepLogged
from shoestring.trainer.telemetry.history import read_metrics

STEPS, CHECKPOINT_EVERY = 60, 5
SEQUENCE, BATCH = 16, 2
CLI = [sys.executable, "-m", "shoestring.launch.cli"]
SMALL = [
    *("experiment=quickstart", "topology=single", "schedule=1f1b", "schedule.micro_batch_size=1"),
    *(f"training.sequence_length={SEQUENCE}", f"training.global_batch_size={BATCH}", "training.device=cpu"),
    *(f"training.tokens={STEPS * SEQUENCE * BATCH}", "training.sample_tokens=0", "training.evaluate_every=0"),
    *(f"training.checkpoint_every={CHECKPOINT_EVERY}", "telemetry.wandb.mode=disabled", "telemetry.log_every=1"),
    *(
        "model.num_hidden_layers=2",
        "model.hidden_size=32",
        "model.intermediate_size=32",
        "model.moe_intermediate_size=32",
        "model.n_routed_experts=4",
    ),
    *(
        "model.n_group=1",
        "model.topk_group=1",
        "model.num_experts_per_tok=2",
        "model.num_attention_heads=2",
        "model.vocab_size=300",
    ),
    *("data.vocab_size=300", "data.validation=[v]", "budget.stop_at=null"),
    "training.collective_timeout_seconds=10",
]
SECONDS = 240
"""Time limit of a launch; one that exceeds it hangs."""
TRACEBACK = "Traceback (most recent call last)"
STOPPED_AT = 7
"""Step after which a run is stopped on request, between two checkpoints."""


@dataclass(frozen=True)
class LaunchResult:
    """Result of a launch."""

    code: int
    words: str
    """Standard error."""


@dataclass
class Row:
    """Row of the table: one fault."""

    name: str
    fault: str
    expected: str
    ep: int = 1
    """Expert-parallel ranks of each run."""
    codes: list[int] = field(default_factory=list)
    """Exit codes of the launches, in order."""
    wrong: list[str] = field(default_factory=list)
    """Deviations from the expected outcome."""
    skipped: str = ""
    """Reason why it was not run; empty if it was."""
    seconds: float = 0.0
    """Duration of the row."""

    def expect(self, is_right: bool, words: str) -> None:
        """Record `words` as a deviation unless `is_right`."""
        if not is_right:
            self.wrong.append(words)

    def check_launch(self, ended: LaunchResult, code: int, words: str) -> None:
        """Record a launch that must have exited with `code` and printed `words` without a traceback."""
        self.codes.append(ended.code)
        self.expect(ended.code == code, f"exit {ended.code} instead of {code}: {ended.words[-300:]}")
        self.expect(words in ended.words, f"did not print {words!r}: {ended.words[-300:]}")
        if code != 1:  # a failing rank may print one
            self.reject_traceback(ended)

    def reject_traceback(self, ended: LaunchResult) -> None:
        """Record a traceback on standard error as a deviation."""
        self.expect(TRACEBACK not in ended.words, f"a traceback: {ended.words[-300:]}")


@dataclass(frozen=True)
class Bench:
    """Prepared data, and the losses of an undisturbed run of `ep` ranks."""

    root: Path
    ep: int = 1
    losses: dict[int, tuple[object, object]] = field(default_factory=dict)

    @property
    def undisturbed(self) -> Path:
        """Directory of the undisturbed run."""
        return self.root / f"undisturbed_ep{self.ep}"

    def overrides(self, run_dir: Path, data: str = "prepared") -> list[str]:
        """Return the overrides of a run in `run_dir` on the data in the folder `data`."""
        place = [f"data.corpus={self.root / 'corpus'}", f"data.prepared={self.root / data}"]
        return [*SMALL, f"topology.ep={self.ep}", *place, f"training.run_dir={run_dir}"]

    def start(self, run_dir: Path, *more: str, data: str = "prepared", shell: str = "", site: str = "") -> "Launch":
        """Start a launch; `shell` is executed before it, `site` is a folder at the front of its module path."""
        command = [*CLI, "train", *self.overrides(run_dir, data), *more]
        if shell:
            command = ["bash", "-c", f'{shell}; exec "$@"', "bash", *command]
        environment = dict(os.environ)
        if site:
            environment["PYTHONPATH"] = os.pathsep.join([site, *filter(None, [os.environ.get("PYTHONPATH")])])
        return Launch(run_dir, command, environment)

    def finish(self, row: Row, run_dir: Path, data: str = "prepared") -> None:
        """Repeat the command until it exits with 0, then compare everything with the undisturbed run."""
        for _ in range(3):
            ended = self.start(run_dir, data=data).wait()
            row.codes.append(ended.code)
            if ended.code == 0:
                break
        row.reject_traceback(ended)
        row.expect(row.codes[-1] == 0, f"the run did not finish: {ended.words[-300:]}")
        if row.codes[-1] == 0:
            self.compare(row, run_dir)

    def compare(self, row: Row, run_dir: Path) -> None:
        """Record losses that differ, and a ledger whose parts do not add up."""
        found = losses(run_dir)
        differing = [step for step, values in self.losses.items() if found.get(step) != values]
        row.expect(not differing, f"losses differ from step {differing[0] if differing else 0} on")
        self.compare_ledger(row, run_dir)

    def compare_ledger(self, row: Row, run_dir: Path) -> None:
        """Record a ledger whose parts do not add up."""
        summary = LedgerReader(run_dir, from_snapshot=False).summarize()
        parts = (
            summary.productive_ms
            + summary.rolled_back_ms
            + sum(summary.gpu_ms_by_bucket.values())
            + summary.unattributed_ms
        )
        row.expect(summary.allocated_ms == parts, f"allocated {summary.allocated_ms} ms, the parts add up to {parts}")

    def stopped(self, row: Row, run_dir: Path) -> None:
        """Create `run_dir` of a run that was stopped on request; the first call trains, later ones copy."""
        first = self.root / f"stopped_ep{self.ep}"
        if not first.exists():
            launch = self.start(first)
            launch.reaches(STOPPED_AT)
            launch.signal(signal.SIGTERM)
            row.check_launch(launch.wait(), 75, "which is in a checkpoint")
        shutil.copytree(first, run_dir)

    def largest_file(self) -> int:
        """Return the bytes of the largest file of a checkpoint."""
        return max(file.stat().st_size for file in self.undisturbed.glob("checkpoints/step_*/*"))

    def checkpoint_bytes(self) -> int:
        """Return the bytes of a checkpoint."""
        return sum(file.stat().st_size for file in next(self.undisturbed.glob("checkpoints/step_*")).iterdir())


def losses(run_dir: Path) -> dict[int, tuple[object, object]]:
    """Return loss and gradient norm of each retained step."""
    events = read_metrics(run_dir / "metrics.jsonl")
    return {e.step: (e.loss, e.grad_norm) for e in events if isinstance(e, StepLogged)}


class Launch:
    """Running `shoestring train`, in a separate process group."""

    def __init__(self, run_dir: Path, command: Sequence[str], environment: dict[str, str]) -> None:
        self.run_dir = run_dir
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 -- closed with this object
        self._process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=self._errors, start_new_session=True
        )

    @property
    def steps(self) -> int:
        """Last step in the metrics."""
        with suppress(OSError):
            found = (self.run_dir / "metrics.jsonl").read_text().rpartition('"kind": "step", "step": ')[2]
            digits = found.partition(",")[0]
            return int(digits) if digits.isdecimal() else 0
        return 0

    def reaches(self, step: int) -> bool:
        """Wait until `step` is done; return False if the launch ends before."""
        return self.until(lambda: self.steps >= step)

    def until(self, condition: Callable[[], bool], seconds: float = SECONDS) -> bool:
        """Wait until `condition` holds or the launch ends; return whether it holds."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._process.poll() is None:
            if condition():
                return True
            time.sleep(0.02)
        return condition()

    def says(self, words: str) -> bool:
        """Wait until the launch has printed `words` on standard error; return False if it ends before."""
        return self.until(lambda: words in os.pread(self._errors.fileno(), 2**24, 0).decode(errors="replace"))

    def signal(self, number: int) -> None:
        """Send a signal to the launcher only."""
        with suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        """Kill the launcher and all of its processes."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def ranks(self) -> list[int]:
        """Return the processes of the ranks, whose grandparent is the launcher, in order of their start."""
        found = []
        for line in subprocess.check_output(["ps", "-eo", "pid=,ppid="], text=True).splitlines():
            pid, parent = map(int, line.split())
            if _parent(parent) == self._process.pid:
                found.append(pid)
        return sorted(found)

    def wait(self) -> LaunchResult:
        """Wait for the end; kill a launch that exceeds the time limit."""
        try:
            code = self._process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            code = 124
        self._errors.seek(0)
        return LaunchResult(code, self._errors.read())


def _parent(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def prepare_data(root: Path) -> None:
    """Write a corpus and prepare it."""
    dice, corpus = random.Random(0), root / "corpus"
    corpus.mkdir()
    words = ["".join(dice.choice("abcdefghijklmnop") for _ in range(dice.randint(2, 8))) for _ in range(800)]
    (corpus / "a.txt").write_text(" ".join(dice.choice(words) for _ in range(3000)))
    (corpus / "v.txt").write_text("abc def ghi abc kkk lmn")
    prepare_corpus(compose_run_config(Bench(root).overrides(root / "run")).data, lambda _: None)


def open_bench(root: Path, ep: int) -> Bench:
    """Train undisturbed on the data in `root`; return the bench."""
    bench = Bench(root, ep)
    ended = bench.start(bench.undisturbed).wait()
    if ended.code:
        raise SystemExit(f"the undisturbed run exited with {ended.code}: {ended.words}")
    bench.losses.update(losses(bench.undisturbed))
    return bench
