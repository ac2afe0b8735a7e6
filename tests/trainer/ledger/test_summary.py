"""The ledger as a whole: the identity, rollbacks, crashes of launcher and ranks, inheritance, and its printed forms."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from shoestring.comm.errors import ConfigError
from shoestring.trainer.ledger.allocation import Allocation
from shoestring.trainer.ledger.clock import Instant
from shoestring.trainer.ledger.config import BudgetConfig
from shoestring.trainer.ledger.journal import Journal
from shoestring.trainer.ledger.meter import CostMeter
from shoestring.trainer.ledger.render import hours, percent, render
from shoestring.trainer.ledger.summary import LedgerSummary, summarize
from shoestring.trainer.ledger.terms import ALLOCATION_FILE, PUBLISHED_GPU_HOURS, PUBLISHED_TOTAL_GPU_HOURS
from shoestring.trainer.ledger.totals import carry
from shoestring.trainer.ledger.work import WorkJournal

BUDGET = BudgetConfig(gpu_hours=0.5)
RANKS = 4
NEVER = 1e6


class Time:
    """A clock that moves when the test says so."""

    def __init__(self) -> None:
        self.ns = 1_000_000_000

    def pass_ms(self, milliseconds: float) -> None:
        self.ns += int(milliseconds * 1e6)


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(Instant, "now", lambda: Instant(time.ns + 5, time.ns, "boot"))
    return time


def launch(run_dir: Path, attempt: str) -> Allocation:
    return Allocation(run_dir, ranks=RANKS, attempt=attempt, budget=BUDGET, beat_seconds=NEVER)


def begin(run_dir: Path, attempt: str) -> WorkJournal:
    return WorkJournal(run_dir, ranks=RANKS, attempt=attempt, budget=BUDGET)


def do_steps(work: WorkJournal, time: Time, first: int, last: int, milliseconds: float = 100) -> None:
    for step in range(first, last + 1):
        time.pass_ms(milliseconds)
        work.step(step, milliseconds, tokens=1000)


def everything(summary: LedgerSummary) -> int:
    return summary.productive_ms + summary.rolled_back_ms + sum(summary.buckets.values()) + summary.unknown_ms


def test_a_run_from_launch_to_end(tmp_path: Path, time: Time) -> None:
    allocation = launch(tmp_path, "a")
    time.pass_ms(2000)
    work = begin(tmp_path, "a")
    time.pass_ms(500)
    work.interval("checkpoint_load", 300)
    work.ready()
    do_steps(work, time, 1, 10)
    time.pass_ms(70)
    work.interval("evaluation", 60.9)
    work.close()
    time.pass_ms(400)
    allocation.close("done")
    summary = summarize(tmp_path)
    buckets = {bucket: spent for bucket, spent in summary.buckets.items() if spent}
    assert buckets == {
        "initialization": RANKS * 2200,
        "checkpoint_load": RANKS * 300,
        "evaluation": RANKS * 60,
        "idle": RANKS * 400,
    }
    assert summary.productive_ms == RANKS * 1000
    assert summary.unknown_ms == RANKS * 10
    assert summary.allocated_ms == everything(summary) == RANKS * 3970
    assert (summary.steps_retained, summary.tokens_consumed, summary.tokens_retained) == (10, 10_000, 10_000)
    assert summary.gpu_hours == pytest.approx(RANKS * 3.970 / 3600)
    assert summary.gpu_hours_per_trillion_tokens == pytest.approx(summary.gpu_hours / 10_000 * 1e12)
    assert summary.budget_share == pytest.approx(summary.gpu_hours / 0.5)
    assert not summary.running


def test_steps_undone_by_a_crash_are_priced_again(tmp_path: Path, time: Time) -> None:
    allocation = launch(tmp_path, "a")
    work = begin(tmp_path, "a")
    work.ready()
    do_steps(work, time, 1, 7)
    work._journal.close()  # the rank dies: no end is recorded
    time.pass_ms(1500)
    work = begin(tmp_path, "a")
    work.resume(4)
    time.pass_ms(500)
    work.ready()
    do_steps(work, time, 5, 8, milliseconds=200)
    work.close()
    allocation.close("done")
    summary = summarize(tmp_path)
    assert summary.productive_ms == RANKS * (4 * 100 + 4 * 200)
    assert summary.rolled_back_ms == RANKS * 3 * 100
    assert (summary.buckets["hang"], summary.buckets["recovery"]) == (RANKS * 1500, RANKS * 500)
    assert summary.unknown_ms == 0
    assert summary.allocated_ms == everything(summary)
    assert (summary.steps_retained, summary.tokens_consumed, summary.tokens_retained) == (8, 11_000, 8000)
    assert summary.attempts == 1


def test_a_step_done_again_is_rolled_back_even_without_a_resume(tmp_path: Path, time: Time) -> None:
    work = begin(tmp_path, "a")
    do_steps(work, time, 1, 3)
    do_steps(work, time, 2, 2)
    work.close()
    summary = summarize(tmp_path)
    assert (summary.productive_ms, summary.rolled_back_ms) == (RANKS * 200, RANKS * 200)


def test_a_killed_launcher_has_held_its_gpus_to_the_last_sign_of_life(tmp_path: Path, time: Time) -> None:
    allocation = launch(tmp_path, "a")
    time.pass_ms(1000)
    allocation.heartbeat()
    assert summarize(tmp_path).allocated_ms == RANKS * 1000
    work = begin(tmp_path, "a")
    do_steps(work, time, 1, 2)
    time.pass_ms(9000)  # nothing is known of this time
    summary = summarize(tmp_path)
    assert summary.allocated_ms == RANKS * 1200
    assert summary.running


def test_two_launches_are_two_segments_and_the_time_between_is_nobodys(tmp_path: Path, time: Time) -> None:
    for attempt, first in (("a", 1), ("b", 4)):
        allocation = launch(tmp_path, attempt)
        time.pass_ms(50)
        work = begin(tmp_path, attempt)
        work.ready()
        do_steps(work, time, first, first + 2)
        work.close()
        allocation.close("preempted")
        time.pass_ms(60_000)
    summary = summarize(tmp_path)
    assert summary.attempts == 2
    assert summary.allocated_ms == everything(summary) == 2 * RANKS * 350
    assert summary.buckets["initialization"] == 2 * RANKS * 50
    assert summary.unknown_ms == 0


def test_work_without_a_launcher_counts_for_its_own_span(tmp_path: Path, time: Time) -> None:
    work = begin(tmp_path, "by hand")
    time.pass_ms(30)
    work.ready()
    do_steps(work, time, 1, 2)
    assert summarize(tmp_path).running
    work.close()
    summary = summarize(tmp_path)
    assert summary.allocated_ms == RANKS * 230
    assert summary.buckets["initialization"] == RANKS * 30
    assert not summary.running


def test_another_number_of_ranks_closes_a_segment(tmp_path: Path, time: Time) -> None:
    allocation = launch(tmp_path, "a")
    for ranks in (RANKS, 2, 2):
        time.pass_ms(10)
        work = WorkJournal(tmp_path, ranks=ranks, attempt="a", budget=BUDGET)
        work.ready()
        time.pass_ms(100)
        work.step(1, 100, tokens=1000)
        work._journal.close()
    allocation.close("done")
    summary = summarize(tmp_path)
    assert (summary.attempts, summary.segments) == (1, 2)
    assert summary.allocated_ms == everything(summary) == RANKS * 110 + RANKS * 10 + 2 * 100 + 2 * 110
    assert summary.buckets["hang"] == RANKS * 10 + 2 * 10
    text = io.StringIO()
    Console(file=text, width=120).print(render(summary))
    assert "1 launch, 2 segments" in text.getvalue()


def test_overlapping_intervals_are_refused(tmp_path: Path, time: Time) -> None:
    work = begin(tmp_path, "a")
    do_steps(work, time, 1, 1)
    work.interval("evaluation", 50)
    work.close()
    with pytest.raises(ConfigError, match="overlap"):
        summarize(tmp_path)


def test_what_a_timed_block_took_is_charged_also_when_it_fails(tmp_path: Path, time: Time) -> None:
    work = begin(tmp_path, "a")

    def save() -> None:
        with work.timing("checkpoint_save"):
            time.pass_ms(5)
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save()
    work.close()
    assert summarize(tmp_path).buckets["checkpoint_save"] == RANKS * 5


def test_what_is_cut_from_short_steps_is_not_lost(tmp_path: Path, time: Time) -> None:
    work = begin(tmp_path, "a")
    do_steps(work, time, 1, 1000, milliseconds=0.75)
    work.close()
    assert summarize(tmp_path).productive_ms == RANKS * 750


def test_mistakes_of_the_caller_are_errors(tmp_path: Path, time: Time) -> None:
    work = begin(tmp_path, "a")
    with pytest.raises(ValueError, match="not a bucket"):
        work.interval("lunch", 5)
    with pytest.raises(ValueError, match="cannot last"):
        work.interval("evaluation", -1)
    launch(tmp_path, "a").close("done")
    with pytest.raises(ValueError, match="name of its own"):
        launch(tmp_path, "a")


def test_a_checkpoint_with_its_ledger_goes_on(tmp_path: Path, time: Time) -> None:
    work = begin(tmp_path, "a")
    do_steps(work, time, 1, 3)
    totals = summarize(tmp_path).totals()
    do_steps(work, time, 4, 5)
    work.close()
    work = begin(tmp_path, "b")
    carry(work, tmp_path, json.loads(json.dumps(totals)))
    work.resume(3)
    assert summarize(tmp_path).inherited_ms == 0
    assert summarize(tmp_path).tokens_retained == 3000


def test_a_checkpoint_copied_without_its_ledger_brings_its_cost(tmp_path: Path, time: Time) -> None:
    first, second, third = tmp_path / "first", tmp_path / "second", tmp_path / "third"
    work = begin(first, "a")
    do_steps(work, time, 1, 3)
    totals = summarize(first).totals()
    for attempt in ("b", "c"):  # the second life in `second` crashed before any step: it inherits once
        work = begin(second, attempt)
        carry(work, second, totals)
        work.resume(3)
        work.close()
    work = begin(second, "d")
    do_steps(work, time, 4, 5)
    summary = summarize(second)
    assert (summary.inherited_ms, summary.allocated_ms, summary.total_ms) == (RANKS * 300, RANKS * 200, RANKS * 500)
    assert (summary.tokens_retained, summary.tokens_consumed) == (5000, 5000)
    assert summary.allocated_ms == everything(summary)
    carry(begin(third, "e"), third, summary.totals())
    assert summarize(third).inherited_ms == RANKS * 500


def test_a_ledger_of_another_run_or_one_behind_is_refused(tmp_path: Path, time: Time) -> None:
    work = begin(tmp_path / "first", "a")
    do_steps(work, time, 1, 3)
    totals = summarize(tmp_path / "first").totals()
    other = begin(tmp_path / "second", "b")
    do_steps(other, time, 1, 1)
    with pytest.raises(ConfigError, match="new run directory"):
        carry(other, tmp_path / "second", totals)
    with pytest.raises(ConfigError, match="restore"):
        carry(work, tmp_path / "first", {**totals, "gpu_ms": 10**9})


def test_the_meter_reads_what_the_ledger_will(tmp_path: Path, time: Time) -> None:
    allocation = launch(tmp_path, "a")
    time.pass_ms(1000)
    work = begin(tmp_path, "a")
    meter = CostMeter(summarize(tmp_path), ranks=RANKS)
    for step in range(1, 6):
        time.pass_ms(100)
        meter.step(work.step(step, 100, tokens=1000))
    work.close()
    allocation.close("done")
    summary = summarize(tmp_path)
    assert meter.gpu_hours() == meter.phase_gpu_hours() == pytest.approx(summary.gpu_hours)
    assert meter.goodput() == pytest.approx(summary.goodput) == pytest.approx(1 / 3)


def test_instants_of_different_boots_compare_by_the_wall(tmp_path: Path) -> None:
    start = Instant(wall_ns=100, monotonic_ns=9000, boot="one")
    assert Instant(wall_ns=50, monotonic_ns=9400, boot="one").ns_since(start) == 400
    assert Instant(wall_ns=700, monotonic_ns=10, boot="two").ns_since(start) == 600
    assert Instant(wall_ns=50, monotonic_ns=10, boot="two").ns_since(start) == 0


def test_the_printed_and_the_json_form_agree(tmp_path: Path, time: Time) -> None:
    work = begin(tmp_path, "a")
    do_steps(work, time, 1, 36, milliseconds=1000)
    work.close()
    summary = summarize(tmp_path)
    data = json.loads(json.dumps(summary.to_json()))
    assert data["gpu_ms"]["allocated"] == RANKS * 36_000
    spent = data["gpu_ms"]
    assert spent["allocated"] == sum(spent.values()) - spent["allocated"] - spent["inherited"]
    assert data["gpu_hours"] == pytest.approx(0.04)
    assert data["published_phase_share"] == pytest.approx(0.04 / 2_664_000)
    text = io.StringIO()
    Console(file=text, width=120).print(render(summary))
    shown = text.getvalue()
    assert "One rank is one GPU, also on CPU." in shown
    assert "8.0 %" in shown
    assert "1,111,111" in shown
    assert "180,000" in shown
    assert "0.0400 GPU-hours" in shown


def test_a_run_without_a_step_or_a_ledger_says_so(tmp_path: Path, time: Time) -> None:
    with pytest.raises(ConfigError, match="no ledger"):
        summarize(tmp_path)
    begin(tmp_path, "a")
    summary = summarize(tmp_path)
    assert summary.gpu_hours_per_trillion_tokens is None
    text = io.StringIO()
    Console(file=text, width=120).print(render(summary))
    assert "pre_train: 1 launch, the last still open" in text.getvalue()


def test_published_phases_add_up_and_units_are_written() -> None:
    assert sum(PUBLISHED_GPU_HOURS.values()) == PUBLISHED_TOTAL_GPU_HOURS
    assert [hours(value) for value in (0.01234, 123.456, 2664000)] == ["0.0123", "123.46", "2,664,000"]
    assert [percent(share) for share in (0, 0.0834, 1.5e-8)] == ["0.0 %", "8.3 %", "1.5e-06 %"]


def test_the_configuration_lists_all_its_problems() -> None:
    assert [problem.field for problem in BudgetConfig(gpu_hours=0, phase="nap").problems()] == ["gpu_hours", "phase"]
    assert not list(BUDGET.problems())


LAUNCHER = """
import sys, time
from pathlib import Path
from shoestring.trainer.ledger.allocation import Allocation
from shoestring.trainer.ledger.config import BudgetConfig
Allocation(Path(sys.argv[1]), ranks=4, attempt="a", budget=BudgetConfig(gpu_hours=0.5), beat_seconds=0.01)
print("open", flush=True)
sys.stdin.read()
"""


@pytest.mark.timeout(60)
def test_a_real_launcher_beats_until_it_is_killed_and_the_next_goes_on(tmp_path: Path) -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == "open\n"
    while summarize(tmp_path).allocated_ms < 4 * 50:
        assert launcher.poll() is None
    with pytest.raises(ConfigError, match="already going on"):
        launch(tmp_path, "b")
    launcher.send_signal(signal.SIGKILL)
    launcher.communicate()
    held = summarize(tmp_path)
    assert held.running
    launch(tmp_path, "b").close("done")
    summary = summarize(tmp_path)
    assert summary.attempts == 2
    assert held.allocated_ms <= summary.allocated_ms
    assert not summary.running


def test_a_ledger_of_another_version_is_refused_by_name(tmp_path: Path) -> None:
    journal = Journal(tmp_path / ALLOCATION_FILE)
    journal.append({"kind": "open", "attempt": "a", "phase": "pre_train"})
    journal.close()
    with pytest.raises(
        ConfigError, match=r"allocation\.jsonl:1: ranks = None: is missing; .* the version of Shoestring that wrote it"
    ):
        summarize(tmp_path)
