"""The guard and the project: projections, thresholds, and budgets shared by several runs."""

from dataclasses import replace
from pathlib import Path

import pytest

from shoestring.tests.trainer.ledger.small_ledger import RANKS, Time, begin, launch
from shoestring.tests.trainer.ledger.timed_runs import BUDGET, HOUR, project_file, run
from shoestring.trainer.ledger.budget_guard import (
    MIN_STEPS_TO_PROJECT,
    BudgetGuard,
    CostMeter,
    compute_budget_accounts,
    project_gpu_hours,
)
from shoestring.trainer.ledger.config import BudgetConfig
from shoestring.trainer.ledger.project import Project
from shoestring.trainer.ledger.summary import summarize_ledger
from shoestring.trainer.ledger.terms import PUBLISHED_GPU_HOURS


def watched(run_dir: Path, time: Time, budget: BudgetConfig) -> BudgetGuard:
    run(run_dir, time, 0.0)
    return BudgetGuard(budget, CostMeter(summarize_ledger(run_dir), ranks=4), run_dir)


def test_a_projection_is_what_is_spent_and_the_rest_at_the_median_price() -> None:
    assert project_gpu_hours(10.0, 14_800_000_000_000, 0.648) == pytest.approx(10 + 2_664_000)  # 180 K per trillion


def test_the_guard_waits_for_a_few_steps_then_warns_then_halts(tmp_path: Path, time: Time) -> None:
    guard = watched(tmp_path, time, BUDGET)
    for number in range(MIN_STEPS_TO_PROJECT):
        assert guard.halt_reason(10**9) is None  # too early to know
        guard.add_step(4000 if number else 10**9, 1000)  # the first step warms up: the median ignores it
    time.pass_seconds(360)  # x 4 ranks: 0.4 GPU-hours
    (account,) = guard.current_accounts(450_000)
    assert [account.spent, account.projected] == pytest.approx([0.4, 0.4 + 0.5])
    assert guard.new_warning(440_000) is None
    assert "91% of budget.gpu_hours = 1" in str(guard.new_warning(459_000))
    assert guard.new_warning(459_000) is None  # said once already
    assert guard.halt_reason(459_000) is None
    reason = guard.halt_reason(560_000)
    assert reason is not None
    assert "has used 0.4 GPU-hours and is projected to use 1.022, of a budget of 1" in reason
    assert "budget.stop_at=null" in reason
    patient = BudgetGuard(replace(BUDGET, stop_at=None), guard.meter, tmp_path)
    for _ in range(MIN_STEPS_TO_PROJECT):
        patient.add_step(4000, 1000)
    assert patient.halt_reason(560_000) is None
    time.pass_seconds(540)
    assert "has used 1 GPU-hours and its budget is 1; raise budget.gpu_hours" in str(patient.halt_reason(100))


def test_a_run_that_stands_still_is_judged_by_its_ledger(tmp_path: Path, time: Time) -> None:
    run(tmp_path, time, 1800, steps=MIN_STEPS_TO_PROJECT)
    summary = summarize_ledger(tmp_path)
    (account,) = compute_budget_accounts(BUDGET, summary, tmp_path, MIN_STEPS_TO_PROJECT * 100)
    assert [account.spent, account.projected] == pytest.approx([0.5, 1.0])
    (account,) = compute_budget_accounts(BUDGET, summary, tmp_path, MIN_STEPS_TO_PROJECT * 200)
    assert "raise budget.gpu_hours" in str(account.halt_reason(1.0))
    assert account.halt_reason(None) is None
    (account,) = compute_budget_accounts(BUDGET, summary, tmp_path, MIN_STEPS_TO_PROJECT * 200, ramp_steps=3)
    assert account.projected is None  # smaller steps do not tell the price of the remaining ones


def test_the_guard_holds_a_run_to_what_others_have_left(tmp_path: Path, time: Time) -> None:
    path = project_file(tmp_path)
    first, second, _ = Project.read(path).runs
    run(first, time, 1.5 * HOUR)
    guard = watched(second, time, replace(BUDGET, gpu_hours=100, project=str(path)))
    assert guard.halt_reason(1000) is None
    time.pass_seconds(0.2 * HOUR)  # x 4 ranks
    reason = str(guard.halt_reason(1000))
    assert "has used 0.8 GPU-hours and its budget is 0.5" in reason
    assert f"raise gpu_hours.pre_train in {path}" in reason


def test_the_configuration_of_the_guard_is_checked() -> None:
    wrong = BudgetConfig(gpu_hours=1, warn_at=0, stop_at=-1, planned_gpu_hours=0, project="")
    fields = [problem.field for problem in wrong.problems()]
    assert fields == ["project", "warn_at", "stop_at", "planned_gpu_hours"]
    assert set(PUBLISHED_GPU_HOURS) == {"pre_train", "context_extension", "post_training"}


def test_the_meter_reads_what_the_ledger_will(tmp_path: Path, time: Time) -> None:
    allocation = launch(tmp_path, "a")
    time.pass_ms(1000)
    work = begin(tmp_path, "a")
    meter = CostMeter(summarize_ledger(tmp_path), ranks=RANKS)
    for step in range(1, 6):
        time.pass_ms(100)
        meter.add_step(work.record_step(step, 100, tokens=1000))
    work.close()
    allocation.close("done")
    summary = summarize_ledger(tmp_path)
    assert meter.gpu_hours() == meter.phase_gpu_hours() == pytest.approx(summary.gpu_hours)
    assert meter.goodput() == pytest.approx(summary.goodput) == pytest.approx(1 / 3)
