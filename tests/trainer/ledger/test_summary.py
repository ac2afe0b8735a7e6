"""The whole ledger: the identity, rollbacks, crashes of launcher and ranks, inheritance, and its printed forms."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from shoestring import __version__
from shoestring.comm.errors import ConfigError
from shoestring.tests.launch.refusals import refused
from shoestring.tests.trainer.ledger.small_ledger import (
    BUDGET,
    OPENING_OF_FORMAT_1,
    RANKS,
    Time,
    begin,
    do_steps,
    everything,
    launch,
    read_journal,
)
from shoestring.tests.tree import ROOT
from shoestring.trainer.ledger.journal import JournalWriter
from shoestring.trainer.ledger.summary import LedgerReader, LedgerSummary, summarize_ledger, summarize_verified_ledger
from shoestring.trainer.ledger.terms import ALLOCATION_FILE, LEDGER_BUCKETS, SNAPSHOT_FILE, WORK_FILE
from shoestring.trainer.ledger.work_journal import WorkJournal


def test_a_run_from_launch_to_end(tmp_path: Path, time: Time) -> None:
    allocation = launch(tmp_path, "a")
    time.pass_ms(2000)
    work = begin(tmp_path, "a")
    time.pass_ms(500)
    work.record_interval("checkpoint_load", 300)
    work.record_ready()
    do_steps(work, time, 1, 10)
    time.pass_ms(70)
    work.record_interval("evaluation", 60.9)
    work.close()
    time.pass_ms(400)
    allocation.close("done")
    summary = summarize_ledger(tmp_path)
    buckets = {bucket: spent for bucket, spent in summary.gpu_ms_by_bucket.items() if spent}
    assert buckets == {
        "initialization": RANKS * 2200,
        "checkpoint_load": RANKS * 300,
        "evaluation": RANKS * 60,
        "idle": RANKS * 400,
    }
    assert summary.productive_ms == RANKS * 1000
    assert summary.unattributed_ms == RANKS * 10
    assert summary.allocated_ms == everything(summary) == RANKS * 3970
    assert (summary.steps_retained, summary.tokens_consumed, summary.tokens_retained) == (10, 10_000, 10_000)
    assert summary.gpu_hours == pytest.approx(RANKS * 3.970 / 3600)
    assert summary.gpu_hours_per_trillion_tokens == pytest.approx(summary.gpu_hours / 10_000 * 1e12)
    assert summary.budget_share == pytest.approx(summary.gpu_hours / 0.5)
    assert not summary.is_running


def test_steps_undone_by_a_crash_are_priced_again(tmp_path: Path, time: Time) -> None:
    allocation = launch(tmp_path, "a")
    work = begin(tmp_path, "a")
    work.record_ready()
    do_steps(work, time, 1, 7)
    work._journal.close()  # the rank dies: no end is recorded
    time.pass_ms(1500)
    work = begin(tmp_path, "a")
    work.record_resume(4)
    time.pass_ms(500)
    work.record_ready()
    do_steps(work, time, 5, 8, milliseconds=200)
    work.close()
    allocation.close("done")
    summary = summarize_ledger(tmp_path)
    assert summary.productive_ms == RANKS * (4 * 100 + 4 * 200)
    assert summary.rolled_back_ms == RANKS * 3 * 100
    assert (summary.gpu_ms_by_bucket["hang"], summary.gpu_ms_by_bucket["restart"]) == (RANKS * 1500, RANKS * 500)
    assert summary.unattributed_ms == 0
    assert summary.allocated_ms == everything(summary)
    assert (summary.steps_retained, summary.tokens_consumed, summary.tokens_retained) == (8, 11_000, 8000)
    assert summary.num_attempts == 1


def test_a_crash_record_divides_hang_from_restart(tmp_path: Path, time: Time) -> None:
    allocation = launch(tmp_path, "a")
    work = begin(tmp_path, "a")
    work.record_ready()
    do_steps(work, time, 1, 2)
    time.pass_ms(700)
    work.close(clean=False)
    time.pass_ms(30)
    work = begin(tmp_path, "a")
    time.pass_ms(5)
    work.record_ready()
    do_steps(work, time, 1, 2)
    work.close()
    allocation.close("done")
    spent = summarize_ledger(tmp_path).gpu_ms_by_bucket
    assert (spent["hang"], spent["restart"]) == (RANKS * 700, RANKS * 35)
    LedgerReader(tmp_path).save_snapshot()
    (attempt,) = json.loads((tmp_path / SNAPSHOT_FILE).read_text())["totals"]["ledger"]["attempts"]
    assert attempt["rank0_starts"] == 2


def test_a_crash_that_nothing_follows_is_a_hang_up_to_the_end_of_the_launcher(tmp_path: Path, time: Time) -> None:
    allocation = launch(tmp_path, "a")
    work = begin(tmp_path, "a")
    work.record_ready()
    do_steps(work, time, 1, 2)
    work._journal.close()
    time.pass_ms(900)
    allocation.close("a rank died")
    spent = summarize_ledger(tmp_path).gpu_ms_by_bucket
    assert (spent["hang"], spent["restart"]) == (RANKS * 900, 0)


def test_the_documented_buckets_are_those_of_the_bill() -> None:
    text = (ROOT / "docs" / "ledger.md").read_text()
    for bucket in ("initialization", "hang", "restart", "skipped", "idle"):
        assert f"| {bucket} | {LEDGER_BUCKETS[bucket]} |" in text


def test_a_step_done_again_is_rolled_back_even_without_a_resume(tmp_path: Path, time: Time) -> None:
    work = begin(tmp_path, "a")
    do_steps(work, time, 1, 3)
    do_steps(work, time, 2, 2)
    work.close()
    summary = summarize_ledger(tmp_path)
    assert (summary.productive_ms, summary.rolled_back_ms) == (RANKS * 200, RANKS * 200)


def test_two_launches_are_two_segments_and_the_time_between_is_free(tmp_path: Path, time: Time) -> None:
    for attempt, first in (("a", 1), ("b", 4)):
        allocation = launch(tmp_path, attempt)
        time.pass_ms(50)
        work = begin(tmp_path, attempt)
        work.record_ready()
        do_steps(work, time, first, first + 2)
        work.close()
        allocation.close("preempted")
        time.pass_ms(60_000)
    summary = summarize_ledger(tmp_path)
    assert summary.num_attempts == 2
    assert summary.allocated_ms == everything(summary) == 2 * RANKS * 350
    assert summary.gpu_ms_by_bucket["initialization"] == 2 * RANKS * 50
    assert summary.unattributed_ms == 0


def test_work_without_a_launcher_counts_for_its_own_span(tmp_path: Path, time: Time) -> None:
    work = begin(tmp_path, "by hand")
    time.pass_ms(30)
    work.record_ready()
    do_steps(work, time, 1, 2)
    assert summarize_ledger(tmp_path).is_running
    work.close()
    summary = summarize_ledger(tmp_path)
    assert summary.allocated_ms == RANKS * 230
    assert summary.gpu_ms_by_bucket["initialization"] == RANKS * 30
    assert not summary.is_running


def test_another_number_of_ranks_closes_a_segment(tmp_path: Path, time: Time) -> None:
    allocation = launch(tmp_path, "a")
    for ranks in (RANKS, 2, 2):
        time.pass_ms(10)
        work = WorkJournal(tmp_path, ranks=ranks, attempt="a", budget=BUDGET)
        work.record_ready()
        time.pass_ms(100)
        work.record_step(1, 100, tokens=1000)
        work._journal.close()
    allocation.close("done")
    summary = summarize_ledger(tmp_path)
    assert (summary.num_attempts, summary.segments) == (1, 2)
    assert summary.allocated_ms == everything(summary) == RANKS * 110 + RANKS * 10 + 2 * 100 + 2 * 110
    assert summary.gpu_ms_by_bucket["hang"] == RANKS * 10 + 2 * 10


@pytest.mark.parametrize("summarize", [summarize_ledger, summarize_verified_ledger])
def test_a_ledger_without_a_format_is_refused_in_one_sentence(
    tmp_path: Path, summarize: Callable[[Path], LedgerSummary]
) -> None:
    (tmp_path / ALLOCATION_FILE).parent.mkdir()
    (tmp_path / ALLOCATION_FILE).write_text(OPENING_OF_FORMAT_1)
    (tmp_path / SNAPSHOT_FILE).write_text("{}")
    assert refused(summarize, tmp_path) == {
        f"{tmp_path / ALLOCATION_FILE}:1: format": f"1: Shoestring {__version__} reads ledger format 2; "
        "use the version that wrote it, or start a new run in another directory"
    }


def test_a_ledger_of_a_later_format_names_the_version_that_wrote_it(tmp_path: Path) -> None:
    journal = JournalWriter(tmp_path / ALLOCATION_FILE)
    journal.append({"kind": "open", "attempt": "a", "format": 3, "version": "0.2.0"})
    journal.close()
    with pytest.raises(ConfigError, match=r"jsonl:1: format = 3: .* use Shoestring 0\.2\.0 that wrote it"):
        summarize_ledger(tmp_path)


def test_an_opening_names_the_format_and_the_version(tmp_path: Path, time: Time) -> None:
    allocation = launch(tmp_path, "a")
    begin(tmp_path, "a").close()
    allocation.close("done")
    for file in (ALLOCATION_FILE, WORK_FILE):
        opening = read_journal(tmp_path / file)[0]
        assert (opening["format"], opening["version"]) == (2, __version__)


def test_an_opening_without_what_it_must_hold_is_refused_by_name(tmp_path: Path) -> None:
    journal = JournalWriter(tmp_path / ALLOCATION_FILE)
    opening = {"kind": "open", "attempt": "a", "format": 2, "version": __version__, "phase": "pre_train"}
    opening |= {"wall_ns": 1, "monotonic_ns": 1, "boot": "one"}
    journal.append(opening)
    journal.close()
    with pytest.raises(
        ConfigError, match=r"allocation\.jsonl:1: ranks = None: is missing; .* the version of Shoestring that wrote it"
    ):
        summarize_ledger(tmp_path)
