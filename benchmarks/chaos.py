"""Faults injected into small runs, and what has become of each: exit codes, later losses to the bit, the ledger's sum.

    python benchmarks/chaos.py [--only H3 M5 ...] [--json FILE]

Each row injects one fault into a run of 60 steps on one process, and afterwards repeats the command without the fault,
until it ends with 0. Losses and gradient norms of every step must equal those of a run that nothing disturbed, and in
the ledger allocated time must be productive + rolled back + buckets + unknown. Rows on a disk that is full mount a
tmpfs, which takes root; without it they are not run. Exit code 1 where a row is not as expected.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from shoestring.launch.compose import compose_run
from shoestring.trainer.budget.summary import LedgerReader
from shoestring.trainer.data.prepare import prepare
from shoestring.trainer.telemetry.history import read_metrics

STEPS, CHECKPOINT_EVERY = 60, 5
SEQUENCE, BATCH = 16, 2
CLI = [sys.executable, "-m", "shoestring.launch.cli"]
SMALL = [
    *("experiment=quickstart", "topology=single", "schedule=one_f_one_b", "schedule.micro_batch=1"),
    *(f"training.sequence_length={SEQUENCE}", f"training.global_batch={BATCH}", "training.device=cpu"),
    *(f"training.tokens={STEPS * SEQUENCE * BATCH}", "training.sample_tokens=0", "training.evaluate_every=0"),
    *(f"training.checkpoint_every={CHECKPOINT_EVERY}", "telemetry.wandb.mode=disabled", "telemetry.log_every=1"),
    *("model.layers=2", "model.hidden=32", "model.dense_ffn=32", "model.expert_ffn=32", "model.experts=4"),
    *("model.groups=1", "model.top_k_groups=1", "model.top_k=2", "model.heads=2", "model.vocabulary=300"),
    *("data.vocabulary=300", "data.validation=[v]", "budget.stop_at=null"),
]
SECONDS = 240
"""No launch takes longer: one that does is hung."""


@dataclass(frozen=True)
class Ended:
    """How a launch has ended."""

    code: int
    words: str
    """Its standard error."""


@dataclass
class Row:
    """One fault."""

    name: str
    fault: str
    expected: str
    codes: list[int] = field(default_factory=list)
    """Of the launches, in order."""
    wrong: list[str] = field(default_factory=list)
    """What is not as expected."""
    skipped: str = ""
    """Why it was not run."""

    def insist(self, is_right: bool, words: str) -> None:
        if not is_right:
            self.wrong.append(words)


@dataclass(frozen=True)
class Bench:
    """Data that was prepared once, and the losses of a run that nothing disturbed."""

    root: Path
    losses: dict[int, tuple[object, object]] = field(default_factory=dict)

    def overrides(self, run_dir: Path, data: str = "prepared") -> list[str]:
        place = [f"data.corpus={self.root / 'corpus'}", f"data.prepared={self.root / data}"]
        return [*SMALL, *place, f"training.run_dir={run_dir}"]

    def start(self, run_dir: Path, *more: str, data: str = "prepared", shell: str = "", site: str = "") -> Launch:
        """Start a launch; `shell` stands before the command, `site` is a folder of modules before all others."""
        command = [*CLI, "train", *self.overrides(run_dir, data), *more]
        if shell:
            command = ["bash", "-c", f'{shell}; exec "$@"', "bash", *command]
        environment = dict(os.environ)
        if site:
            environment["PYTHONPATH"] = os.pathsep.join([site, *filter(None, [os.environ.get("PYTHONPATH")])])
        return Launch(run_dir, command, environment)

    def finish(self, row: Row, run_dir: Path, data: str = "prepared") -> None:
        """Repeat the command until it ends with 0, then compare everything with the undisturbed run."""
        for _ in range(3):
            ended = self.start(run_dir, data=data).wait()
            row.codes.append(ended.code)
            if ended.code == 0:
                break
        row.insist(row.codes[-1] == 0, f"the run was never finished: {ended.words[-300:]}")
        if row.codes[-1] == 0:
            self.compare(row, run_dir)

    def compare(self, row: Row, run_dir: Path) -> None:
        found = losses(run_dir)
        differing = [step for step, values in self.losses.items() if found.get(step) != values]
        row.insist(not differing, f"losses differ from step {differing[0] if differing else 0} on")
        summary = LedgerReader(run_dir, from_totals=False).summary()
        parts = summary.productive_ms + summary.rolled_back_ms + sum(summary.buckets.values()) + summary.unknown_ms
        row.insist(summary.allocated_ms == parts, f"allocated {summary.allocated_ms} ms, the parts add up to {parts}")


def losses(run_dir: Path) -> dict[int, tuple[object, object]]:
    """Loss and gradient norm of each step that the weights hold."""
    events = read_metrics(run_dir / "metrics.jsonl")
    return {e.step: (e.values["loss"], e.values["grad_norm"]) for e in events if e.kind == "step"}


class Launch:
    """`shoestring train` under way, in a process group of its own."""

    def __init__(self, run_dir: Path, command: Sequence[str], environment: dict[str, str]) -> None:
        self.run_dir = run_dir
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 -- closed with this object
        self._process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=self._errors, start_new_session=True
        )

    @property
    def steps(self) -> int:
        """The last step in the metrics."""
        with suppress(OSError):
            found = (self.run_dir / "metrics.jsonl").read_text().rpartition('"kind": "step", "step": ')[2]
            digits = found.partition(",")[0]
            return int(digits) if digits.isdecimal() else 0
        return 0

    def reaches(self, step: int) -> bool:
        """Wait until `step` is done; False where the launch ends before."""
        return self.until(lambda: self.steps >= step)

    def until(self, condition: Callable[[], bool], seconds: float = SECONDS) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._process.poll() is None:
            if condition():
                return True
            time.sleep(0.02)
        return condition()

    def signal(self, number: int) -> None:
        """To the launcher alone."""
        with suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        """Everything at once."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def rank(self) -> int | None:
        """The process of rank 0: the one whose parent's parent is the launcher."""
        for line in subprocess.check_output(["ps", "-eo", "pid=,ppid="], text=True).splitlines():
            pid, parent = map(int, line.split())
            if _parent(parent) == self._process.pid:
                return pid
        return None

    def wait(self) -> Ended:
        try:
            code = self._process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            code = 124
        self._errors.seek(0)
        return Ended(code, self._errors.read())


def _parent(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A tmpfs of `size` bytes."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(path: Path, seconds: float = 0.0) -> None:
    """Take every byte that the disk has left, and for so long also what is given back."""
    deadline = time.monotonic() + seconds
    with path.open("wb", buffering=0) as file:
        while True:
            with suppress(OSError):
                while True:
                    file.write(b"x" * 4096)
            if time.monotonic() >= deadline:
                return
            time.sleep(0.005)


def told(row: Row, ended: Ended, code: int, words: str) -> None:
    """A launch must have ended with `code`, said `words`, and shown no traceback."""
    row.codes.append(ended.code)
    row.insist(ended.code == code, f"exit {ended.code} instead of {code}: {ended.words[-300:]}")
    row.insist(words in ended.words, f"does not say {words!r}: {ended.words[-300:]}")
    if code != 1:  # torchrun shows one of its own for every rank that dies
        row.insist("Traceback" not in ended.words, f"a traceback: {ended.words[-300:]}")


def torn_status(bench: Bench, row: Row, place: Path) -> None:
    for number, text in enumerate(("", '{"exit_code": 7')):
        run_dir = place / f"run{number}"
        launch = bench.start(run_dir)
        launch.reaches(7)
        launch.signal(signal.SIGTERM)
        told(row, launch.wait(), 75, "which is in a checkpoint")
        (run_dir / "run_status.json").write_text(text)
        bench.finish(row, run_dir)


def leftovers_fill_the_disk(bench: Bench, row: Row, place: Path) -> None:
    checkpoint = sum(f.stat().st_size for f in next((bench.root / "undisturbed/checkpoints").glob("step_*")).iterdir())
    with small_disk(place / "disk", 2 * checkpoint + 3 * 2**20) as disk:
        run_dir = disk / "run"
        launch = bench.start(run_dir)
        launch.reaches(12)
        launch.kill()
        row.codes.append(-signal.SIGKILL)
        partial = run_dir / "checkpoints" / "step_00000099.partial"
        partial.mkdir(exist_ok=True)
        fill(partial / "part_00000.safetensors")
        bench.finish(row, run_dir)


def full_for_a_while(bench: Bench, row: Row, place: Path) -> None:
    with small_disk(place / "disk", 64 * 2**20) as disk:
        launch = bench.start(disk / "run")
        launch.reaches(8)
        fill(disk / "filler", 1.5)
        (disk / "filler").unlink()
        told(row, launch.wait(), 0, "wait in memory")
        bench.compare(row, disk / "run")


def stopped_on_a_full_disk(bench: Bench, row: Row, place: Path) -> None:
    with small_disk(place / "disk", 64 * 2**20) as disk:
        launch = bench.start(disk / "run", "training.failed_saves=1000")
        launch.reaches(8)
        fill(disk / "filler")
        launch.signal(signal.SIGTERM)
        fill(disk / "filler too", 4.0)
        told(row, launch.wait(), 75, "whose checkpoint could not be written")
        for filler in disk.glob("filler*"):
            filler.unlink()
        bench.finish(row, disk / "run")


def no_save_succeeds(bench: Bench, row: Row, place: Path) -> None:
    part = next((bench.root / "undisturbed/checkpoints").glob("step_*/part_00000.safetensors")).stat().st_size
    launch = bench.start(place / "run", shell=f"ulimit -f {part // 2 // 1024}")
    told(row, launch.wait(), 1, "training.failed_saves")
    row.insist(launch.steps < STEPS, "it has trained to its end")
    bench.finish(row, place / "run")


def more_shards_than_files(bench: Bench, row: Row, place: Path) -> None:
    config = compose_run(bench.overrides(place / "run", "many")).data
    tokens = prepare(compose_run(bench.overrides(place / "run")).data, lambda _: None).train.tokens
    manifest = prepare(config, lambda _: None, shard_tokens=max(1, tokens // 1060))
    row.insist(len(manifest.train.shards) >= 1049, f"only {len(manifest.train.shards)} shards")
    row.codes.append(bench.start(place / "run", data="many", shell="ulimit -n 1024").wait().code)
    bench.finish(row, place / "run", "many")


def changed_tokens(bench: Bench, row: Row, place: Path) -> None:
    data = shutil.copytree(bench.root / "prepared", bench.root / "changed")
    shard = data / "train_00000.bin"
    whole = shard.read_bytes()
    launch = bench.start(place / "run", data="changed")
    launch.reaches(12)
    with shard.open("r+b") as file:
        file.write(bytes(len(whole)))
    told(row, launch.wait(), 1, "train_00000.bin is not what was prepared")
    shard.write_bytes(whole)
    bench.finish(row, place / "run", "changed")


def stopped_rank(bench: Bench, row: Row, place: Path) -> None:
    launch = bench.start(place / "run")
    launch.reaches(12)
    rank = launch.rank()
    row.insist(rank is not None, "there is no rank to stop")
    if rank is not None:
        os.kill(rank, signal.SIGSTOP)
        time.sleep(5)
        os.kill(rank, signal.SIGCONT)
    row.codes.append(launch.wait().code)
    bench.compare(row, place / "run")
    summary = LedgerReader(place / "run").summary()
    share = summary.unknown_ms / summary.allocated_ms
    row.insist(share <= 0.05, f"{share:.0%} of the time is unknown")


def half_a_ledger(name: str) -> Callable[[Bench, Row, Path], None]:
    def inject(bench: Bench, row: Row, place: Path) -> None:
        launch = bench.start(place / "run")
        launch.reaches(12)
        launch.signal(signal.SIGTERM)
        told(row, launch.wait(), 75, "which is in a checkpoint")
        half, aside = place / "run" / "ledger" / name, place / name
        half.rename(aside)
        told(row, bench.start(place / "run").wait(), 2, name)
        aside.rename(half)
        bench.finish(row, place / "run")

    return inject


def impossible_sizes(bench: Bench, row: Row, place: Path) -> None:
    for number, sizes in enumerate(
        (
            ["topology.edp=512", "training.global_batch=512"],
            ["model.hidden=1000000000", "model.experts=100000000"],
            ["model.layers=10000000"],
            ["training.global_batch=1" + 30 * "0"],
        )
    ):
        launch = bench.start(place / f"run{number}", *sizes)
        if launch.until(partial(has_ranks, launch), 60):  # 512 of them would stop this machine
            launch.kill()
            row.insist(False, f"{sizes[0]} was started, and killed by this script")
        else:
            told(row, launch.wait(), 2, sizes[0].partition("=")[0])


def has_ranks(launch: Launch) -> bool:
    return launch.rank() is not None


def no_locks(bench: Bench, row: Row, place: Path) -> None:
    site = place / "site"
    site.mkdir(parents=True)
    lines = [
        "import errno, fcntl, os",
        "def flock(file, how):",
        "    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))",
    ]
    (site / "sitecustomize.py").write_text("\n".join([*lines, "fcntl.flock = flock", ""]))
    told(row, bench.start(place / "run", site=str(site)).wait(), 2, "cannot be locked")
    bench.finish(row, place / "run")


def removed_directory(bench: Bench, row: Row, place: Path) -> None:
    launch = bench.start(place / "run")
    launch.reaches(12)
    (place / "run").rename(place / "gone")
    shutil.rmtree(place / "gone")
    told(row, launch.wait(), 1, "was removed")
    shutil.rmtree(place / "run", ignore_errors=True)
    bench.finish(row, place / "run")


@dataclass(frozen=True)
class Injection:
    name: str
    fault: str
    expected: str
    inject: Callable[[Bench, Row, Path], None]
    needs_root: bool = False


INJECTIONS = (
    Injection("H1", "run_status.json empty, then torn", "treated as absent", torn_status),
    Injection("H2", "a leftover .partial fills the disk", "cleared at start; goes on", leftovers_fill_the_disk, True),
    Injection("H3", "no room for 1.5 s", "goes on; records written when there is room", full_for_a_while, True),
    Injection("H3", "no room, then SIGTERM", "exit 75", stopped_on_a_full_disk, True),
    Injection("H4", "every save fails (ulimit -f)", "stops after 3 in a row, exit 1", no_save_succeeds),
    Injection("M4", "1,049 shards, ulimit -n 1024", "trains", more_shards_than_files),
    Injection("M5", "tokens of a shard overwritten in mid-run", "noticed, exit 1", changed_tokens),
    Injection("M6", "rank 0 stopped for 5 s", "attributed: unknown at most 5 %", stopped_rank),
    Injection("M6", "ledger/work.jsonl removed", "refused, exit 2", half_a_ledger("work.jsonl")),
    Injection("M6", "ledger/allocation.jsonl removed", "refused, exit 2", half_a_ledger("allocation.jsonl")),
    Injection("M7", "edp=512, hidden=1e9, layers=1e7, batch=1e30", "refused, exit 2", impossible_sizes),
    Injection("M9", "a file system without flock", "one clear error, exit 2", no_locks),
    Injection("M10", "run directory removed in mid-run", "a fault, said, exit 1", removed_directory),
)


def open_bench(root: Path) -> Bench:
    """Write a corpus, prepare it, and train without disturbance."""
    dice, corpus = random.Random(0), root / "corpus"
    corpus.mkdir()
    words = ["".join(dice.choice("abcdefghijklmnop") for _ in range(dice.randint(2, 8))) for _ in range(800)]
    (corpus / "a.txt").write_text(" ".join(dice.choice(words) for _ in range(3000)))
    (corpus / "v.txt").write_text("abc def ghi abc kkk lmn")
    bench = Bench(root)
    prepare(compose_run(bench.overrides(root / "undisturbed")).data, lambda _: None)
    ended = bench.start(root / "undisturbed").wait()
    if ended.code:
        raise SystemExit(f"the undisturbed run ended with {ended.code}: {ended.words}")
    bench.losses.update(losses(root / "undisturbed"))
    return bench


def measure(only: Sequence[str], root: Path) -> list[Row]:
    bench, rows = open_bench(root), []
    for number, each in enumerate(INJECTIONS):
        if only and each.name not in only:
            continue
        row = Row(each.name, each.fault, each.expected)
        if each.needs_root and os.geteuid() != 0:
            row.skipped = "needs root, for a tmpfs"
        else:
            place = root / f"row{number}"
            place.mkdir()
            each.inject(bench, row, place)
        rows.append(row)
        verdict = row.skipped or ("as expected" if not row.wrong else "; ".join(row.wrong))
        print(f"{row.name} {row.fault}: {verdict}", file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW", help="rows by their names")
    parser.add_argument("--json", type=Path, help="write the rows there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as root:
        rows = measure(options.only, Path(root))
    table = Table("row", "fault", "expected", "exit codes", "found", box=None)
    for row in rows:
        found = row.skipped or ("; ".join(word[:80] for word in row.wrong) if row.wrong else "as expected")
        table.add_row(row.name, row.fault, row.expected, ", ".join(map(str, row.codes)), found)
    Console(width=160, markup=False).print(table)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    sys.exit(any(row.wrong for row in rows))


if __name__ == "__main__":
    main()
