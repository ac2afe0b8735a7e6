"""`shoestring budget` and the checks before a run: tables, JSON, what-if, project, refusals."""

import json
from pathlib import Path

import pytest

from shoestring import __version__
from shoestring.launch.compose import compose_run_config
from shoestring.launch.run.preflight import budget_problems
from shoestring.tests.launch.command_line import answer, answer_of, exit_code
from shoestring.tests.launch.renderings import check_renderings
from shoestring.trainer.ledger.clock import Instant
from shoestring.trainer.ledger.config import BudgetConfig
from shoestring.trainer.ledger.terms import SNAPSHOT_FILE, STEP_TIME_TERMS, WORK_FILE
from shoestring.trainer.ledger.work_journal import WorkJournal


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write an hour of two ranks: ten steps of 1000 tokens, a tenth of the time evaluation."""
    ns = 10**9
    monkeypatch.setattr(Instant, "now", lambda: Instant(ns, ns, "boot"))
    work = WorkJournal(tmp_path / "run", ranks=2, attempt="a", budget=BudgetConfig(gpu_hours=4))
    work.record_ready()
    for step in range(1, 11):
        ns += 324 * 10**9
        work.record_step(step, 324_000, 1000)
        work.record_step_time_terms(step, 200, dict.fromkeys(STEP_TIME_TERMS, 20) | {"bubble": 15})
    ns += 360 * 10**9
    work.record_interval("evaluation", 360_000)
    work.close()
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def test_the_budget_splits_productive_time_and_shows_the_published_one(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = answer(capsys, "budget", run_dir)
    for words in ("all-to-all not overlapped", "1F1B", "bubble", "imbalance", "From 10 steps sampled on all ranks"):
        assert words in text
    for figure in ("180,000", "2,664,000", "2,788,000", "200,000,000", "$4.00 at $2 per GPU-hour", "90.0 %"):
        assert figure in text
    for figure in ("GPU-hours: 2.0000 (50.0 % of the budget of 4.0000", "tokens retained: 10,000 (of 10,000 consumed)"):
        assert figure in text
    tree = json.loads(answer(capsys, "budget", run_dir, "--format", "json"))
    assert sum(tree["terms_gpu_ms"].values()) == sum(tree["report_gpu_ms"].values()) == tree["gpu_ms"]["productive"]
    assert tree["report_gpu_ms"]["bubble"] == 3 * tree["report_gpu_ms"]["imbalance"]
    assert tree["gpu_hours"] == 2.0
    assert tree["version"] == __version__


def test_what_if_prices_tokens_on_other_gpus(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("budget", run_dir, "--tokens", "14.8T", "--gpus", "2048", "--usd-per-gpu-hour", "3")
    text = answer(capsys, *asked)
    assert "14.8T tokens on 2,048 GPUs" in text
    assert "2,664,000" in text
    tree = json.loads(answer(capsys, *asked, "--format", "json"))["what_if"]
    everything = tree["everything it was charged"]
    assert everything["gpu_hours"] == pytest.approx(2.0 / 10_000 * 14.8e12)
    assert everything["days"] == pytest.approx(everything["gpu_hours"] / 2048 / 24)
    assert everything["usd"] == pytest.approx(3 * everything["gpu_hours"])
    assert tree["its last steps, their median"]["gpu_hours"] == pytest.approx(0.9 * everything["gpu_hours"])


@pytest.mark.parametrize(
    ("options", "gist"),
    [
        (["--tokens", "14.8T"], "needs the other"),
        (["--gpus", "8"], "needs the other"),
        (["--tokens", "many", "--gpus", "8"], "must be a number of tokens"),
        (["--tokens", "1T", "--gpus", "0"], "must be at least 1"),
        (["--usd-per-gpu-hour", "-1"], "must be at least 0"),
        (["--sacct", "absent"], "cannot be used: No such file"),
        (["--invoice", "absent", "--invoice-columns", "price=x"], "gpu_hours=NAME,amount=NAME"),
    ],
)
def test_questions_that_make_no_sense_are_refused(
    run_dir: Path, options: list[str], gist: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("budget", run_dir, *options) == 2
    assert gist in capsys.readouterr().err


def test_a_project_is_summed_up(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run_dir.parent / "project.yaml"
    path.write_text("gpu_hours: {pre_train: 5}\nruns: [run, later]\n")
    text = answer(capsys, "budget", path)
    for words in ("2 runs", "later", "3.0000", "40.0 %", "200,000,000"):
        assert words in text
    tree = json.loads(answer(capsys, "budget", path, "--format", "json"))
    assert tree["phase_gpu_hours"]["pre_train"] == 2.0
    assert tree["version"] == __version__
    assert exit_code("budget", path, "--tokens", "1T", "--gpus", "1") == 2
    assert "is for one run" in capsys.readouterr().err


def test_the_ledger_is_reconciled_from_the_command_line(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accounting, invoice = run_dir.parent / "sacct", run_dir.parent / "invoice.csv"
    accounting.write_text("JobID|ElapsedRaw|AllocTRES\n7|60|gres/gpu=2\n")
    invoice.write_text("gpu_hours,amount\n2.5,6\n")
    text = answer(capsys, "budget", run_dir, "--sacct", accounting, "--invoice", invoice)
    for words in ("job 7: no attempt of this run", "attempt a: outside of any job", "-0.5000", "invoiced $6.00"):
        assert words in text


def test_three_renderings_show_the_same_numbers(run_dir: Path) -> None:
    project, invoice = run_dir.parent / "project.yaml", run_dir.parent / "invoice.csv"
    project.write_text("gpu_hours: {pre_train: 5}\nruns: [run, later]\n")
    invoice.write_text("gpu_hours,amount\n2.5,6\n")
    of_run = ("--tokens", "14.8T", "--gpus", "2048", "--invoice", invoice, "--verify")
    for arguments, quantities in (((run_dir, *of_run), 60), ((project,), 15)):
        check_renderings(answer_of("budget", *arguments), smallest_number_of_quantities=quantities)


def problems(run_dir: Path, *overrides: str, fresh: bool = False) -> dict[str, str]:
    config = compose_run_config(["experiment=quickstart", f"training.run_dir={run_dir}", *overrides])
    return {problem.field: problem.hint for problem in budget_problems(config, fresh=fresh)}


def test_a_plan_over_budget_is_refused_unless_allowed(run_dir: Path) -> None:
    plan = "budget.planned_gpu_hours=0.6"
    assert "exceeds budget.gpu_hours, 0.5" in problems(run_dir, plan)["budget.planned_gpu_hours"]
    assert not problems(run_dir, plan, "budget.allow_over_plan=true")
    assert not problems(run_dir, "budget.planned_gpu_hours=0.4")


def test_a_run_of_a_project_is_held_to_what_is_left_there(run_dir: Path) -> None:
    path = run_dir.parent / "project.yaml"
    path.write_text("gpu_hours: {pre_train: 2.1}\nruns: [run, later]\n")
    own, later = f"budget.project={path}", run_dir.parent / "later"
    assert not problems(later, own)
    assert "2.1" not in str(problems(run_dir, own))
    found = problems(later, own, "budget.planned_gpu_hours=0.2")
    assert f"exceeds the remaining budget in {path}, 0.1" in found["budget.planned_gpu_hours"]
    assert not problems(run_dir, own, fresh=True)  # this one has no launcher's half to lose
    (run_dir / "ledger" / "allocation.jsonl").touch()
    assert "would erase" in problems(run_dir, own, fresh=True)["--fresh"]
    assert not problems(run_dir, fresh=True)
    assert "is not among the runs" in problems(run_dir.parent / "stranger", own)["training.run_dir"]
    assert "has no budget" in problems(later, own, "budget.phase=post_training")["budget.phase"]
    path.write_text("gpu_hours: {pre_train: 1.9}\nruns: [run, later]\n")
    assert "is used up" in problems(later, own)["budget.project"]


def test_a_budget_that_lost_records_says_so(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "the saved totals agree" in answer(capsys, "budget", run_dir, "--verify")
    work = run_dir / WORK_FILE
    work.write_text("".join(work.read_text().splitlines(keepends=True)[:9]))
    for words in ([], ["--format", "json"]):
        assert exit_code("budget", run_dir, *words) == 0
        assert f"{WORK_FILE} = '24 records': are counted by" in capsys.readouterr().err
    assert exit_code("budget", run_dir, "--verify") == 2
    assert f"{WORK_FILE} = '24 records'" in capsys.readouterr().err
    (run_dir / SNAPSHOT_FILE).unlink()
    assert "there are no saved totals" in answer(capsys, "budget", run_dir, "--verify")
