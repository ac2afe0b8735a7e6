"""Saved totals of a ledger: reading on from them gives what the whole ledger gives, or they are ignored."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.trainer.ledger import retained_steps as retained
from shoestring.trainer.ledger import snapshot
from shoestring.trainer.ledger.allocation_journal import AllocationJournal
from shoestring.trainer.ledger.config import BudgetConfig
from shoestring.trainer.ledger.journal import JournalReader
from shoestring.trainer.ledger.snapshot import read_snapshot
from shoestring.trainer.ledger.summary import (
    LedgerReader,
    LedgerSummary,
    ensure_snapshot,
    summarize_ledger,
    summarize_verified_ledger,
)
from shoestring.trainer.ledger.terms import ALLOCATION_FILE, SNAPSHOT_FILE, STEP_TIME_TERMS, WORK_FILE
from shoestring.trainer.ledger.work_journal import WorkJournal

BUDGET = BudgetConfig(gpu_hours=1.0)


@pytest.fixture(autouse=True)
def nothing_is_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "SNAPSHOT_MIN_BYTES", 0)


def full(run_dir: Path) -> LedgerSummary:
    return LedgerReader(run_dir, from_snapshot=False).summarize()


def train(run_dir: Path, attempt: str, first: int, last: int, *, close: bool = True) -> None:
    allocation = AllocationJournal(run_dir, ranks=2, attempt=attempt, budget=BUDGET, heartbeat_seconds=1e6)
    work = WorkJournal(run_dir, ranks=2, attempt=attempt, budget=BUDGET)
    if first > 1:
        work.record_resume(first - 1)
    work.record_ready()
    for step in range(first, last + 1):
        work.record_interval("data_stall", 0.0)
        work.record_step(step, 0.0, 8)
    work.record_step_time_terms(last, 200, dict.fromkeys(STEP_TIME_TERMS, 20) | {"bubble": 15})
    if close:
        work.close()
        allocation.close(f"{last} steps done")
    else:
        work._journal.close()
        allocation._closing.set()
        allocation._journal.close()


def test_totals_and_what_came_since_are_the_whole(tmp_path: Path) -> None:
    train(tmp_path, "a", 1, 20)
    train(tmp_path, "b", 16, 30, close=False)
    saved = read_snapshot(tmp_path)
    assert saved is not None
    assert 0 < saved.work.number < len(list(JournalReader(tmp_path / WORK_FILE).stream_lines()))
    assert summarize_ledger(tmp_path) == full(tmp_path)
    assert (summarize_ledger(tmp_path).steps_retained, summarize_ledger(tmp_path).num_attempts) == (30, 2)
    assert summarize_verified_ledger(tmp_path) == full(tmp_path)


def test_any_sequence_of_launches_is_the_same_with_totals_and_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It also holds where a run goes back to before the steps that the totals know."""
    monkeypatch.setattr(retained, "MAX_STEPS_KEPT", 4)
    dice, last = random.Random(3), 0
    for number in range(12):
        first = dice.randint(0, last) + 1
        last = first + dice.randint(0, 9)
        train(tmp_path, f"launch {number}", first, last, close=dice.random() < 0.7)
        assert summarize_ledger(tmp_path) == full(tmp_path)
        assert summarize_verified_ledger(tmp_path) == full(tmp_path)


def test_a_short_ledger_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, "a", 1, 3)
    assert read_snapshot(tmp_path) is not None
    monkeypatch.setattr(snapshot, "SNAPSHOT_MIN_BYTES", 10**6)
    assert read_snapshot(tmp_path) is None
    assert summarize_ledger(tmp_path) == full(tmp_path)


def test_a_launch_makes_totals_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ensure_snapshot(tmp_path)
    train(tmp_path, "a", 1, 30)
    (tmp_path / SNAPSHOT_FILE).unlink()
    ensure_snapshot(tmp_path)
    made = (tmp_path / SNAPSHOT_FILE).read_bytes()
    assert summarize_verified_ledger(tmp_path) == summarize_ledger(tmp_path) == full(tmp_path)
    (tmp_path / SNAPSHOT_FILE).write_bytes(made[:-50])
    ensure_snapshot(tmp_path)
    assert (tmp_path / SNAPSHOT_FILE).read_bytes() == made
    (tmp_path / SNAPSHOT_FILE).unlink()
    monkeypatch.setattr(snapshot, "SNAPSHOT_MIN_BYTES", 10**6)
    ensure_snapshot(tmp_path)
    assert not (tmp_path / SNAPSHOT_FILE).exists()


def edit(path: Path, change: Callable[[dict[str, object]], None]) -> None:
    tree = json.loads(path.read_text())
    change(tree["totals"])
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.write_text(""),
        lambda path: path.write_text(path.read_text()[:-50]),
        lambda path: path.write_text("[]"),
        lambda path: path.write_text('{"sha256": "0", "totals": null}'),
        lambda path: path.write_bytes(b"\xff\xfe"),
        lambda path: path.write_text("[" * 100_000),
        lambda path: edit(path, lambda totals: totals.update(work={"position": 0, "number": 0, "head": "0" * 64})),
        lambda path: edit(path, lambda totals: totals.update(format=1)),
        lambda path: path.unlink(),
    ],
)
def test_totals_that_are_not_as_they_were_written_count_for_nothing(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    train(tmp_path, "a", 1, 5)
    before = full(tmp_path)
    harm(tmp_path / SNAPSHOT_FILE)
    assert read_snapshot(tmp_path) is None
    assert summarize_ledger(tmp_path) == before


def test_totals_of_another_ledger_count_for_nothing(tmp_path: Path) -> None:
    train(tmp_path / "one", "a", 1, 5)
    train(tmp_path / "two", "a", 1, 9)
    (tmp_path / "two" / SNAPSHOT_FILE).write_bytes((tmp_path / "one" / SNAPSHOT_FILE).read_bytes())
    assert read_snapshot(tmp_path / "two") is None
    assert summarize_ledger(tmp_path / "two").steps_retained == 9
    with pytest.raises(
        ConfigError, match=r"allocation.jsonl = '\d+ records': are counted by .*snapshot.json but not all in"
    ):
        summarize_verified_ledger(tmp_path / "two")


def cut(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        (WORK_FILE, Path.unlink),
        (WORK_FILE, cut),
        (WORK_FILE, lambda path: path.write_text(path.read_text()[:-9])),
        (ALLOCATION_FILE, Path.unlink),
        (ALLOCATION_FILE, cut),
    ],
)
def test_verifying_misses_records_that_the_totals_count(
    name: Path, harm: Callable[[Path], None], tmp_path: Path
) -> None:
    train(tmp_path, "a", 1, 5)
    train(tmp_path, "b", 6, 9)
    train(tmp_path, "c", 10, 12)
    harm(tmp_path / name)
    with pytest.raises(ConfigError, match=f"{name} = "):
        summarize_verified_ledger(tmp_path)


def test_verifying_names_totals_that_were_damaged(tmp_path: Path) -> None:
    train(tmp_path, "a", 1, 5)
    (tmp_path / SNAPSHOT_FILE).write_text("{}")
    with pytest.raises(ConfigError, match=r"snapshot.json = 'saved totals': are damaged"):
        summarize_verified_ledger(tmp_path)


def test_verifying_finds_what_totals_hide(tmp_path: Path) -> None:
    train(tmp_path, "a", 1, 5)
    work = tmp_path / WORK_FILE
    whole = work.read_text()
    work.write_text(whole.replace('"tokens":8', '"tokens":9', 1))
    with pytest.raises(ConfigError, match="chain of hashes is broken"):
        summarize_verified_ledger(tmp_path)
    work.write_text(whole)
    path = tmp_path / SNAPSHOT_FILE
    tree = json.loads(path.read_text())
    tree["totals"]["ledger"]["tally"]["tokens_consumed"] += 1
    tree["sha256"] = snapshot._digest(tree["totals"])
    path.write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match="differ from the ledger's records"):
        summarize_verified_ledger(tmp_path)


@pytest.mark.parametrize("place", [{"position": -1}, {"position": 1.0}, {"number": "1"}, {"head": 5}, {"other": 1}])
def test_totals_that_end_at_no_place_count_for_nothing(place: dict[str, object], tmp_path: Path) -> None:
    """It holds even if their hash fits: a position of -1 would read the whole file."""
    train(tmp_path, "a", 1, 20)
    saved = json.loads((tmp_path / SNAPSHOT_FILE).read_text())
    assert read_snapshot(tmp_path) is not None
    saved["totals"]["work"] |= place
    saved["sha256"] = snapshot._digest(saved["totals"])
    (tmp_path / SNAPSHOT_FILE).write_text(json.dumps(saved))
    assert read_snapshot(tmp_path) is None
    assert summarize_ledger(tmp_path) == full(tmp_path)


def test_a_step_0_goes_back_to_nothing_that_was_forgotten(tmp_path: Path) -> None:
    train(tmp_path, "a", 0, 3)
    assert full(tmp_path).steps_retained == 4
