"""Faults: each function injects one into runs of a bench, and records deviations from the expected outcome."""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shoestring.launch.compose import compose_run_config
from shoestring.trainer.data.preparation.prepare import prepare_corpus
from shoestring.trainer.ledger.summary import LedgerReader
from shoestring.trainer.run.reporter import RECORDS_WAIT

from .bench import CLI, STEPS, Bench, Launch, LaunchResult, Row

Inject = Callable[[Bench, Row, Path], None]
_KEPT = frozenset({"metrics.jsonl", "work.jsonl", "allocation.jsonl"})
"""Files without which a run does not start, or that hold more than state."""


@dataclass(frozen=True)
class Injection:
    """Row of the table with its function."""

    name: str
    fault: str
    expected: str
    inject: Inject
    needs_root: bool = False
    ep: int = 1


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """Mount a tmpfs of `size` bytes."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(path: Path, until: Callable[[], bool] = lambda: True) -> None:
    """Fill the disk, and keep it full while `until` runs in a thread."""
    with ThreadPoolExecutor(1) as waiting, path.open("wb", buffering=0) as file:
        seen = waiting.submit(until)
        while True:
            with suppress(OSError):
                while True:
                    file.write(b"x" * 4096)
            if seen.done():
                return
            time.sleep(0.005)


def site(place: Path, *lines: str) -> str:
    """Create a folder whose sitecustomize.py, with these lines, every Python process of a launch executes."""
    folder = place / "site"
    folder.mkdir(parents=True)
    (folder / "sitecustomize.py").write_text("\n".join([*lines, ""]))
    return str(folder)


def harmed(raw: bytes, how: str) -> bytes:
    """Return content of a file as a crash may leave it."""
    if how == "torn":
        return raw[: len(raw) // 2]
    return b"" if how == "empty" else random.Random(0).randbytes(len(raw) or 100)


def torn_status(bench: Bench, row: Row, place: Path) -> None:
    """H1 as first observed: an empty, then a torn status file."""
    for number, text in enumerate(("", '{"exit_code": 7')):
        run_dir = place / f"run{number}"
        bench.stopped(row, run_dir)
        (run_dir / "run_status.json").write_text(text)
        bench.finish(row, run_dir)


def torn_status_of_a_killed_run(bench: Bench, row: Row, place: Path) -> None:
    """H1 after a kill, so that no rank has written a status."""
    launch = bench.start(place / "run")
    launch.reaches(12)
    launch.kill()
    row.codes.append(-signal.SIGKILL)
    (place / "run" / "run_status.json").write_text('{"exit_code": 7')
    bench.finish(row, place / "run")


def torn_small_files(how: str) -> Inject:
    """H1 for all small files of the run directory and the data together."""

    def inject(bench: Bench, row: Row, place: Path) -> None:
        run_dir, data = place / "run", f"data_{how}"
        bench.stopped(row, run_dir)
        shutil.copytree(bench.root / "prepared", bench.root / data)
        rare = ("stops_without_step", "ended", "rendezvous", "wandb_run_id", "ledger/snapshot.json")
        stamp = bench.root / data / ".verified.json"
        for file in (*(run_dir / name for name in rare), stamp):
            file.touch()
        files = [file for folder in (run_dir, run_dir / "ledger") for file in folder.iterdir() if file.is_file()]
        for file in (*files, stamp):
            if file.name not in _KEPT:
                file.write_bytes(harmed(file.read_bytes(), how))
        bench.finish(row, run_dir, data)

    return inject


def torn_journals(bench: Bench, row: Row, place: Path) -> None:
    """H1 for growing files: a power loss leaves zeros in place of a line, or half of a line."""
    for number, tail in enumerate((bytes(4096), b'{"attempt":"', b"\xff\x00{")):
        run_dir = place / f"run{number}"
        bench.stopped(row, run_dir)
        for name in ("metrics.jsonl", "ledger/work.jsonl", "ledger/allocation.jsonl"):
            with (run_dir / name).open("ab") as file:
                file.write(tail)
        bench.finish(row, run_dir)


def harmed_checkpoint(bench: Bench, row: Row, place: Path) -> None:
    """H1 for the newest checkpoint, with an empty or torn file: the previous one is loaded."""
    first = place / "first"
    bench.stopped(row, first)
    newest = max(first.glob("checkpoints/step_????????"))
    for number, name in enumerate(sorted(file.name for file in newest.iterdir())):
        run_dir = place / f"run{number}"
        shutil.copytree(first, run_dir)
        file = run_dir / "checkpoints" / newest.name / name
        file.write_bytes(harmed(file.read_bytes(), "empty" if number % 2 else "torn"))
        bench.finish(row, run_dir)


def torn_inputs(bench: Bench, row: Row, place: Path) -> None:
    """H1 for a plan and a measured cluster: one clear error each."""
    cluster = place / "conf" / "cluster" / "measured.yaml"
    cluster.parent.mkdir(parents=True)
    for how in ("empty", "torn", "noise"):
        plan = place / f"plan_{how}.json"
        plan.write_bytes(harmed(b'{"format": 2, "layouts": [{"pp": 1, "time_terms": {"F": 1', how))
        row.check_launch(_cli("budget", str(bench.undisturbed), "--against", str(plan)), 2, plan.name)
        cluster.write_bytes(harmed(b"name: measured\npeak_tflops: {a: [1", how) if how != "empty" else b"name: [\n")
        row.check_launch(_cli("simulate", "--config-dir", str(place / "conf"), "cluster=measured"), 2, "measured")


def _cli(*arguments: str) -> LaunchResult:
    found = subprocess.run([*CLI, *arguments], capture_output=True, text=True, errors="replace", check=False)
    return LaunchResult(found.returncode, found.stderr)


def leftovers_fill_the_disk(bench: Bench, row: Row, place: Path) -> None:
    """H2: unfinished saves of earlier attempts fill the disk."""
    with small_disk(place / "disk", 2 * bench.checkpoint_bytes() + 3 * 2**20) as disk:
        run_dir = disk / "run"
        launch = bench.start(run_dir)
        launch.reaches(12)
        launch.kill()
        row.codes.append(-signal.SIGKILL)
        partial_save = run_dir / "checkpoints" / "step_00000099.partial"
        partial_save.mkdir(exist_ok=True)
        fill(partial_save / "part_00000.safetensors")
        bench.finish(row, run_dir)


def full_for_a_while(bench: Bench, row: Row, place: Path) -> None:
    """H3: records wait in memory and are written later."""
    with small_disk(place / "disk", 64 * 2**20) as disk:
        launch = bench.start(disk / "run")
        launch.reaches(8)
        fill(
            disk / "filler", lambda: launch.says(RECORDS_WAIT)
        )  # with a fixed time, a fast run would end before the fault
        (disk / "filler").unlink()
        row.check_launch(launch.wait(), 0, RECORDS_WAIT)
        bench.compare(row, disk / "run")


def failing_writes(place: Path, error: str, which: str) -> tuple[str, Path]:
    """Return a site whose processes fail to write the files of `which` while the second result, a flag file, exists."""
    flag = place / "failing"
    lines = (
        "import errno, os",
        "write = os.write",
        "def failing(file, raw):",
        "    name = os.readlink(f'/proc/self/fd/{file}')",
        f"    if os.path.exists({str(flag)!r}) and {which}:",
        f"        raise OSError(errno.{error}, os.strerror(errno.{error}))",
        "    return write(file, raw)",
        "os.write = failing",
    )
    return site(place, *lines), flag


RECORDS = "name.endswith('.jsonl')"
SAVES = "'.partial/' in name"


def writes_fail_for_a_while(error: str, which: str, words: str) -> Inject:
    """H3 with other errors than ENOSPC, in metrics and ledger, or in saves."""

    def inject(bench: Bench, row: Row, place: Path) -> None:
        folder, flag = failing_writes(place, error, which)
        launch = bench.start(place / "run", "training.max_failed_saves=1000", site=folder)
        launch.reaches(8)
        flag.touch()
        launch.says(words)
        flag.unlink()
        row.check_launch(launch.wait(), 0, words)
        bench.compare(row, place / "run")

    return inject


def no_room_at_the_launch(bench: Bench, row: Row, place: Path) -> None:
    """H3 at the launch, in the directory of a stopped run and in a new one."""
    with small_disk(place / "disk", 64 * 2**20) as disk:
        bench.stopped(row, disk / "run")
        fill(disk / "filler")
        for run_dir in (disk / "run", disk / "new"):
            row.check_launch(bench.start(run_dir).wait(), 2, "cannot be written")
        (disk / "filler").unlink()
        bench.finish(row, disk / "run")
        bench.finish(row, disk / "new")


def stopped_on_a_full_disk(bench: Bench, row: Row, place: Path) -> None:
    """H3: a stop on a full disk keeps its exit code."""
    with small_disk(place / "disk", 64 * 2**20) as disk:
        launch = bench.start(disk / "run", "training.max_failed_saves=1000")
        launch.reaches(8)
        fill(disk / "filler")
        launch.signal(signal.SIGTERM)
        fill(disk / "filler too", lambda: launch.until(lambda: False, 4.0))
        row.check_launch(launch.wait(), 75, "whose checkpoint could not be written")
        for filler in disk.glob("filler*"):
            filler.unlink()
        bench.finish(row, disk / "run")


def no_save_succeeds(bench: Bench, row: Row, place: Path) -> None:
    """H4: every save fails."""
    launch = bench.start(place / "run", shell=f"ulimit -f {bench.largest_file() // 2 // 1024}")
    row.check_launch(launch.wait(), 1, "training.max_failed_saves")
    row.expect(launch.steps < STEPS, "the run trained to its end")
    bench.finish(row, place / "run")


def saves_of_one_rank_fail(bench: Bench, row: Row, place: Path) -> None:
    """H4 only on the last rank: the others must not accept the save."""
    folder, flag = failing_writes(place, "EIO", f"{SAVES} and os.environ.get('RANK') == '{bench.ep - 1}'")
    flag.touch()
    row.check_launch(bench.start(place / "run", site=folder).wait(), 1, "training.max_failed_saves")
    row.expect(not list((place / "run").glob("checkpoints/step_????????")), "a checkpoint lacks a rank")
    bench.finish(row, place / "run")


def checkpoints_is_a_file(bench: Bench, row: Row, place: Path) -> None:
    """H4 with a cause before the launch: checkpoints/ is a file."""
    bench.stopped(row, place / "run")
    folder = place / "run" / "checkpoints"
    folder.rename(place / "aside")
    folder.touch()
    ended = bench.start(place / "run").wait()
    row.codes.append(ended.code)
    row.expect(ended.code in (1, 2) and str(folder) in ended.words, f"exit {ended.code}: {ended.words[-300:]}")
    row.reject_traceback(ended)
    folder.unlink()
    (place / "aside").rename(folder)
    bench.finish(row, place / "run")


def many_shards(bench: Bench, row: Row, place: Path) -> str:
    """Return the name of data in 1,049 shards or more, which the first call prepares."""
    if not (bench.root / "many").exists():
        tokens = prepare_corpus(compose_run_config(bench.overrides(place / "run")).data, lambda _: None).train.tokens
        config = compose_run_config(bench.overrides(place / "run", "many")).data
        prepare_corpus(config, lambda _: None, shard_tokens=max(1, tokens // 1060))
        shards = len(list((bench.root / "many").glob("*.train.*.bin")))
        row.expect(shards >= 1049, f"only {shards} shards")
    return "many"


def more_shards_than_files(limit: int) -> Inject:
    """M4: more shards than a process may have open files."""

    def inject(bench: Bench, row: Row, place: Path) -> None:
        data = many_shards(bench, row, place)
        row.codes.append(bench.start(place / "run", data=data, shell=f"ulimit -n {limit}").wait().code)
        bench.finish(row, place / "run", data)

    return inject


def data_moved_away(bench: Bench, row: Row, place: Path) -> None:
    """M5 for all shards together, most of which are not open at that time."""
    data = bench.root / many_shards(bench, row, place)
    launch = bench.start(place / "run", data=data.name)
    launch.reaches(12)
    data.rename(place / "moved")
    ended = launch.wait()
    (place / "moved").rename(data)
    row.check_launch(ended, 1, "cannot be read")
    bench.finish(row, place / "run", data.name)


def changed_tokens(change: Callable[[Path], None], *, must_notice: bool = True) -> Inject:
    """M5: `change` modifies a shard in mid-run."""

    def inject(bench: Bench, row: Row, place: Path) -> None:
        name = f"changed_{place.name}"
        data = shutil.copytree(bench.root / "prepared", bench.root / name)
        shard = min(data.glob("*.train.00000.bin"))
        whole = shard.read_bytes()
        launch = bench.start(place / "run", data=name)
        launch.reaches(12)
        change(shard)
        ended = launch.wait()
        if must_notice or ended.code != 0:
            row.check_launch(ended, 1, shard.name)
        else:
            row.codes.append(0)
        shard.unlink(missing_ok=True)
        shard.write_bytes(whole)
        bench.finish(row, place / "run", name)

    return inject


def overwrite(shard: Path) -> None:
    """Set every token to 0."""
    with shard.open("r+b") as file:
        file.write(bytes(shard.stat().st_size))


def truncate(shard: Path) -> None:
    """Truncate the shard to half."""
    os.truncate(shard, shard.stat().st_size // 2)


def replace(shard: Path) -> None:
    """Replace the shard by another file."""
    other = shard.with_name("other")
    other.write_bytes(bytes(shard.stat().st_size))
    other.replace(shard)


def stopped_rank(number: int) -> Inject:
    """M6: a rank is paused for 5 s, outside or inside a step."""

    def inject(bench: Bench, row: Row, place: Path) -> None:
        launch = bench.start(place / "run")
        launch.reaches(12)
        ranks = launch.ranks()
        row.expect(len(ranks) == bench.ep, f"there are {len(ranks)} ranks")
        os.kill(ranks[number], signal.SIGSTOP)
        time.sleep(5)
        os.kill(ranks[number], signal.SIGCONT)
        row.codes.append(launch.wait().code)
        row.expect(row.codes[-1] == 0, "the run did not finish")
        bench.compare(row, place / "run")
        summary = LedgerReader(place / "run").summarize()
        share = summary.unattributed_ms / summary.allocated_ms
        row.expect(share <= 0.05, f"{share:.0%} of the time is unattributed")

    return inject


def changed_ledger(name: str, change: Callable[[bytes], bytes | None]) -> Inject:
    """M6: a file of the ledger is changed, or removed if `change` returns None; restored, the run resumes."""

    def inject(bench: Bench, row: Row, place: Path) -> None:
        bench.stopped(row, place / "run")
        file = place / "run" / "ledger" / name
        whole = file.read_bytes()
        harmed_bytes = change(whole)
        file.unlink() if harmed_bytes is None else file.write_bytes(harmed_bytes)
        row.check_launch(bench.start(place / "run").wait(), 2, name)
        file.write_bytes(whole)
        bench.finish(row, place / "run")

    return inject


def without_last_lines(raw: bytes) -> bytes:
    """Return the file without its last lines, as after the loss of unsynced data."""
    return b"".join(raw.splitlines(keepends=True)[:-12])


def with_last_line_twice(raw: bytes) -> bytes:
    """Return the file with its last line repeated, as after a repeated copy."""
    return raw + raw.splitlines(keepends=True)[-1]


def with_other_number(raw: bytes) -> bytes:
    """Return the file with an edited number, as to lower the cost."""
    return raw.replace(b'"tokens":32', b'"tokens":64', 1)


def no_ledger(bench: Bench, row: Row, place: Path) -> None:
    """M6: the whole ledger is removed, and the checkpoint carries the cost."""
    bench.stopped(row, place / "run")
    spent = LedgerReader(place / "run").summarize().total_ms
    shutil.rmtree(place / "run" / "ledger")
    bench.finish(row, place / "run")
    inherited = LedgerReader(place / "run").summarize().inherited_ms
    row.expect(0 < inherited <= spent, f"{inherited} of {spent} GPU-ms are inherited")


def impossible_sizes(*cases: Sequence[str]) -> Inject:
    """M7: sizes that no machine can hold."""

    def inject(bench: Bench, row: Row, place: Path) -> None:
        for number, sizes in enumerate(cases):
            launch = bench.start(place / f"run{number}", *sizes)
            field, _, value = sizes[0].partition("=")
            if launch.until(partial(_has_ranks, launch), 60):  # 512 ranks would overload this machine
                launch.kill()
                row.expect(False, f"{sizes[0]} was started; this script killed it")
            else:
                # A problem of all sizes of a topology names them together.
                row.check_launch(launch.wait(), 2, f"edp={value}" if field == "topology.edp" else field)

    return inject


def _has_ranks(launch: Launch) -> bool:
    return bool(launch.ranks())


def no_locks(error: str) -> Inject:
    """M9: a file system without locks."""

    def inject(bench: Bench, row: Row, place: Path) -> None:
        lines = (
            "import errno, fcntl, os",
            "def flock(file, how):",
            f"    raise OSError(errno.{error}, os.strerror(errno.{error}))",
            "fcntl.flock = flock",
        )
        row.check_launch(bench.start(place / "run", site=site(place, *lines)).wait(), 2, "cannot be locked")
        if error == "ENOSYS":
            bench.finish(row, place / "run")

    return inject


def removed(name: str) -> Inject:
    """M10: the run directory, or a folder in it that the run needs, is removed in mid-run."""

    def inject(bench: Bench, row: Row, place: Path) -> None:
        run_dir = place / "run"
        launch = bench.start(run_dir)
        launch.reaches(12)
        (run_dir / name).rename(place / "gone")
        shutil.rmtree(place / "gone")
        row.check_launch(launch.wait(), 1, "was removed")
        if not name:
            shutil.rmtree(run_dir, ignore_errors=True)
        bench.finish(row, run_dir)

    return inject


def another_in_its_place(bench: Bench, row: Row, place: Path) -> None:
    """M10: the run directory is moved away, and an empty one has its name."""
    launch = bench.start(place / "run")
    launch.reaches(12)
    (place / "run").rename(place / "moved")
    (place / "run").mkdir()
    row.check_launch(launch.wait(), 1, "was removed")
    shutil.rmtree(place / "run")
    (place / "moved").rename(place / "run")
    bench.finish(row, place / "run")


def removed_part(name: str) -> Inject:
    """M10: a part of the run directory that the run can recreate is removed."""

    def inject(bench: Bench, row: Row, place: Path) -> None:
        launch = bench.start(place / "run")
        launch.reaches(12)
        for path in (place / "run").glob(name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        ended = launch.wait()
        row.check_launch(ended, 0, "")
        bench.compare_ledger(row, place / "run")
        row.expect(bool(list((place / "run").glob(f"checkpoints/step_{STEPS:08d}"))), "the last checkpoint is missing")
        found = (place / "run" / "metrics.jsonl").read_text()
        row.expect(f'"step": {STEPS}, "loss": {bench.losses[STEPS][0]}' in found, "the last loss differs")

    return inject


INJECTIONS = (
    Injection("H1", "run_status.json empty, then torn", "treated as absent", torn_status),
    Injection("H1", "run_status.json torn after a kill", "treated as absent", torn_status_of_a_killed_run, ep=2),
    Injection("H1", "every small file of run and data empty", "treated as absent", torn_small_files("empty")),
    Injection("H1", "every small file torn", "treated as absent", torn_small_files("torn")),
    Injection("H1", "every small file noise", "treated as absent", torn_small_files("noise"), ep=2),
    Injection("H1", "zeros or half a line in journals", "truncated; continues", torn_journals),
    Injection("H1", "a file of the newest checkpoint torn", "continues from the previous one", harmed_checkpoint),
    Injection("H1", "plan.json, measured cluster torn", "one clear error, exit 2", torn_inputs),
    Injection("H2", "a leftover .partial fills the disk", "deleted at start; continues", leftovers_fill_the_disk, True),
    Injection("H3", "disk full for a while", "continues; written when there is space", full_for_a_while, True),
    Injection("H3", "disk full for a while", "continues; written when there is space", full_for_a_while, True, ep=2),
    Injection("H3", "disk full, then SIGTERM", "exit 75", stopped_on_a_full_disk, True),
    Injection(
        "H3",
        "EDQUOT for a while",
        "continues; written later",
        writes_fail_for_a_while("EDQUOT", RECORDS, RECORDS_WAIT),
    ),
    Injection(
        "H3", "EIO for a while", "continues; written later", writes_fail_for_a_while("EIO", RECORDS, RECORDS_WAIT)
    ),
    Injection(
        "H3",
        "EROFS for a while",
        "continues; written later",
        writes_fail_for_a_while("EROFS", RECORDS, RECORDS_WAIT),
        ep=2,
    ),
    Injection(
        "H3",
        "EIO in saves for a while",
        "continues, saves again",
        writes_fail_for_a_while("EIO", SAVES, "could not be written"),
    ),
    Injection("H3", "disk full at the launch", "one clear error, exit 2", no_room_at_the_launch, True),
    Injection("H4", "every save fails (ulimit -f)", "stops after 3 in a row, exit 1", no_save_succeeds),
    Injection(
        "H4", "every save of the last rank fails", "stops after 3 in a row, exit 1", saves_of_one_rank_fail, ep=2
    ),
    Injection("H4", "checkpoints is a file", "one clear error", checkpoints_is_a_file),
    Injection("M4", "1,049 shards, ulimit -n 1024", "trains", more_shards_than_files(1024)),
    Injection("M4", "1,049 shards, ulimit -n 256", "trains", more_shards_than_files(256)),
    Injection("M5", "a shard overwritten in mid-run", "noticed, exit 1", changed_tokens(overwrite)),
    Injection("M5", "a shard truncated in mid-run", "noticed, exit 1", changed_tokens(truncate)),
    Injection("M5", "a shard replaced in mid-run", "noticed, or not read", changed_tokens(replace, must_notice=False)),
    Injection(
        "M5", "a shard removed in mid-run", "noticed, or not read", changed_tokens(Path.unlink, must_notice=False)
    ),
    Injection("M5", "1,049 shards moved away in mid-run", "noticed, exit 1", data_moved_away),
    Injection("M6", "rank 0 stopped for 5 s", "attributed: unattributed at most 5 %", stopped_rank(0)),
    Injection("M6", "rank 1 stopped for 5 s", "attributed: unattributed at most 5 %", stopped_rank(1), ep=2),
    Injection("M6", "ledger/work.jsonl removed", "error, exit 2", changed_ledger("work.jsonl", lambda _: None)),
    Injection(
        "M6", "ledger/allocation.jsonl removed", "error, exit 2", changed_ledger("allocation.jsonl", lambda _: None)
    ),
    Injection(
        "M6", "work.jsonl without its last lines", "error, exit 2", changed_ledger("work.jsonl", without_last_lines)
    ),
    Injection("M6", "work.jsonl empty", "error, exit 2", changed_ledger("work.jsonl", lambda _: b"")),
    Injection("M6", "a number of work.jsonl edited", "error, exit 2", changed_ledger("work.jsonl", with_other_number)),
    Injection(
        "M6", "the last line of work.jsonl twice", "error, exit 2", changed_ledger("work.jsonl", with_last_line_twice)
    ),
    Injection("M6", "ledger/ removed between launches", "the checkpoint carries the cost", no_ledger, ep=2),
    Injection(
        *("M7", "edp=512, hidden=1e9, layers=1e7, batch=1e30", "error, exit 2"),
        impossible_sizes(
            ("topology.edp=512", "training.global_batch_size=512"),
            ("model.hidden_size=1000000000", "model.n_routed_experts=100000000"),
            ("model.num_hidden_layers=10000000",),
            ("training.global_batch_size=1" + 30 * "0",),
        ),
    ),
    Injection(
        *("M7", "sequence=1e9, vocabulary=1e12, heads=1e9, tokens=1e30", "error, exit 2"),
        impossible_sizes(
            ("training.sequence_length=1000000000",),
            ("model.vocab_size=1000000000000",),
            ("model.num_attention_heads=1000000000",),
            ("training.tokens=1" + 30 * "0",),
        ),
    ),
    *(
        Injection("M9", f"flock fails: {error}", "one clear error, exit 2", no_locks(error))
        for error in ("ENOSYS", "EACCES", "ENOLCK", "EROFS")
    ),
    Injection("M10", "run directory removed in mid-run", "one clear error, exit 1", removed("")),
    Injection("M10", "run directory removed in mid-run", "one clear error, exit 1", removed(""), ep=2),
    Injection("M10", "ledger/ removed in mid-run", "one clear error, exit 1", removed("ledger"), ep=2),
    Injection("M10", "another directory in its place", "one clear error, exit 1", another_in_its_place),
    Injection("M10", "checkpoints/ removed in mid-run", "continues, saves again", removed_part("checkpoints")),
    Injection("M10", "metrics.jsonl removed in mid-run", "continues in a new file", removed_part("metrics.jsonl")),
)
