"""A ledger on a disk that is full for a while, has no locks, or lost one half."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.tests.full_disk import largest_file
from shoestring.tests.launch.refusals import by_field, refused
from shoestring.tests.trainer.ledger.small_ledger import read_journal
from shoestring.trainer.ledger.allocation_journal import AllocationJournal
from shoestring.trainer.ledger.checkpoint_totals import ledger_problems
from shoestring.trainer.ledger.config import BudgetConfig
from shoestring.trainer.ledger.journal import JournalWriter, refuse_if_locked
from shoestring.trainer.ledger.summary import LedgerSummary, summarize_ledger
from shoestring.trainer.ledger.terms import ALLOCATION_FILE, WORK_FILE
from shoestring.trainer.ledger.work_journal import WorkJournal

BUDGET = BudgetConfig(gpu_hours=1.0)


def launch(run_dir: Path, attempt: str) -> AllocationJournal:
    return AllocationJournal(run_dir, ranks=2, attempt=attempt, budget=BUDGET, heartbeat_seconds=1e6)


def adds_up(summary: LedgerSummary) -> bool:
    parts = (
        summary.productive_ms
        + summary.rolled_back_ms
        + sum(summary.gpu_ms_by_bucket.values())
        + summary.unattributed_ms
    )
    return summary.allocated_ms == parts


def test_records_wait_for_room_and_the_chain_is_whole(tmp_path: Path) -> None:
    allocation = launch(tmp_path, "a")
    work = WorkJournal(tmp_path, ranks=2, attempt="a", budget=BUDGET)
    work.record_ready()
    with largest_file((tmp_path / WORK_FILE).stat().st_size + 10):
        for step in range(1, 6):
            work.record_step(step, 0.0, 8)
        assert (work.pending_records, work.write_error) == (5, "File too large")
        assert work.ledger.summarize().steps_retained == 0  # records that a checkpoint relies on are on the disk
    work.record_step(6, 0.0, 8)
    work.close()
    allocation.close("done")
    assert [record.get("step") for record in read_journal(tmp_path / WORK_FILE)][2:-1] == [*range(1, 7)]
    assert summarize_ledger(tmp_path).steps_retained == 6
    assert adds_up(summarize_ledger(tmp_path))


def test_an_attempt_that_ends_on_a_full_disk_leaves_a_usable_ledger(tmp_path: Path) -> None:
    for attempt in ("a", "b"):
        allocation = launch(tmp_path, attempt)
        work = WorkJournal(tmp_path, ranks=2, attempt=attempt, budget=BUDGET)
        work.record_ready()
        with largest_file((tmp_path / WORK_FILE).stat().st_size + 100):
            work.record_step(1, 0.0, 8)
            work.close()
        allocation.close("done")
    assert adds_up(summarize_ledger(tmp_path))
    assert [record["kind"] for record in read_journal(tmp_path / WORK_FILE)] == ["begin", "ready"] * 2


def test_records_beyond_the_bound_are_left_out_of_the_chain_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = WorkJournal(tmp_path, ranks=2, attempt="a", budget=BUDGET)
    monkeypatch.setattr(work._journal._writer, "_limit", 400)
    with largest_file((tmp_path / WORK_FILE).stat().st_size):
        for step in range(1, 6):
            work.record_step(step, 0.0, 8)
    work.record_step(6, 0.0, 8)
    work.close()
    kinds = [
        (record["kind"], record.get("step", record.get("records"))) for record in read_journal(tmp_path / WORK_FILE)
    ]
    assert kinds == [("begin", None), ("step", 1), ("left_out", 4), ("step", 6), ("end", None)]
    assert adds_up(summarize_ledger(tmp_path))


def test_a_launch_without_room_for_its_first_record_is_refused(tmp_path: Path) -> None:
    with largest_file(10):
        for file, begin in (
            (ALLOCATION_FILE, lambda: launch(tmp_path, "a")),
            (WORK_FILE, lambda: WorkJournal(tmp_path, ranks=2, attempt="a", budget=BUDGET)),
        ):
            assert "cannot be written (File too large); free disk space" in refused(begin)[str(tmp_path / file)]
    assert (tmp_path / WORK_FILE).stat().st_size == 0


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.EIO])
def test_a_file_system_without_locks_is_refused_in_one_sentence(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    (message,) = refused(JournalWriter, tmp_path / "work.jsonl").values()
    assert f"cannot be locked ({os.strerror(number)})" in message
    assert "use a file system with flock" in message


def test_a_journal_that_is_being_written_is_recognized(tmp_path: Path) -> None:
    refuse_if_locked(tmp_path / "work.jsonl")
    journal = JournalWriter(tmp_path / "work.jsonl")
    with pytest.raises(ConfigError, match="another process is writing this journal"):
        refuse_if_locked(tmp_path / "work.jsonl")
    journal.close()
    refuse_if_locked(tmp_path / "work.jsonl")


def trained(run_dir: Path) -> LedgerSummary:
    allocation = launch(run_dir, "a")
    work = WorkJournal(run_dir, ranks=2, attempt="a", budget=BUDGET)
    work.record_ready()
    work.record_step(1, 0.0, 8)
    summary = work.ledger.summarize()
    work.close()
    allocation.close("done")
    return summary


def test_a_ledger_of_which_a_half_is_missing_is_refused(tmp_path: Path) -> None:
    totals = trained(tmp_path).checkpoint_totals()
    assert by_field(ledger_problems(tmp_path, totals)) == {}
    for file in (WORK_FILE, ALLOCATION_FILE):
        whole = (tmp_path / file).read_bytes()
        for harm in (whole[: whole.index(b"\n") + 1] if file == WORK_FILE else b"", None):  # cut, or removed
            (tmp_path / file).unlink() if harm is None else (tmp_path / file).write_bytes(harm)
            (field,) = by_field(ledger_problems(tmp_path, totals))
            assert field == str(tmp_path / file)
        (tmp_path / file).write_bytes(whole)


def test_a_checkpoint_that_was_copied_without_its_ledger_may_be_resumed_twice(tmp_path: Path) -> None:
    totals = trained(tmp_path / "first").checkpoint_totals()
    for attempt in ("b", "c"):
        assert by_field(ledger_problems(tmp_path / "second", totals)) == {}
        allocation = launch(tmp_path / "second", attempt)
        work = WorkJournal(tmp_path / "second", ranks=2, attempt=attempt, budget=BUDGET)
        if attempt == "b":
            work.record_inherited_totals(totals)
        work.close()
        allocation.close("done")
