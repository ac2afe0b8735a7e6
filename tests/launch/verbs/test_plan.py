"""`shoestring plan` as a command: its layouts and their order, and refusals."""

from pathlib import Path

import pytest

from shoestring import __version__
from shoestring.launch.planner.plan_file import PLAN_FORMAT
from shoestring.launch.verbs.plan import plan, plan_answer
from shoestring.tests.launch.command_line import answer, tree_of
from shoestring.tests.launch.renderings import check_renderings
from shoestring.tests.launch.small_plan import SMALL_PLAN

V3 = "experiment=deepseek_v3_h800"


@pytest.mark.parametrize("keep", ["0", "-1"])
def test_a_plan_keeps_something(capsys: pytest.CaptureFixture[str], keep: str) -> None:
    assert f"--keep = {keep}: must be at least 1" in answer(capsys, "plan", V3, "--keep", keep, code=2)


def test_a_configured_layout_that_does_not_fit_is_marked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    grid = ("topology.pp=1", "topology.edp=1", "topology.ep=32", "schedule=1f1b")
    said = answer(capsys, *SMALL_PLAN, *grid, "recompute=nothing", "precision=bf16")
    assert "does NOT fit into 84.94 GB" in said
    assert "there is no comparison" in said


def test_a_plan_fits_into_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = answer(capsys, *SMALL_PLAN).splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    cells = [line.replace("│", " ").split() for line in lines]
    rows = [row for row in cells if row[:1] in (["1"], ["current"])]
    assert [row[0] for row in rows] == ["1", "current", "1", "current"]
    assert [len(row) for row in rows[:2]] == [11, 11]  # every figure stands in the one line of its layout
    words = " ".join(" ".join(map(" ".join, cells)).split())
    assert "pipeline bubble" in words
    assert "does NOT fit into" in " ".join(rows[3])
    assert "To run the best layout, add: " in words


def test_a_plan_counts_layouts_whose_ramp_is_illegal(capsys: pytest.CaptureFixture[str]) -> None:
    ramp = (
        "training.rampup_start_batch_size=64",
        "training.rampup_batch_size_increment=64",
        "training.rampup_tokens=1_000_000",
    )
    found = tree_of(capsys, *SMALL_PLAN, *ramp)
    reasons = [reason for reason in found["illegal"] if reason.startswith("training.rampup_start_batch_size")]
    assert "training.rampup_start_batch_size (dualpipe)" in reasons
    assert [phase["name"] for phase in found["phase_costs"]] == ["batch ramp", "pre-training"]


def test_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    found = tree_of(capsys, *SMALL_PLAN)
    assert (found["format"], found["version"]) == (PLAN_FORMAT, __version__)
    counted = (
        sum(found["illegal"].values()) + sum(found["out_of_memory"].values()) + found["simulated"] + found["pruned"]
    )
    assert counted == found["considered"]
    steps = [layout["step_seconds"] for layout in found["layouts"]]
    assert steps == sorted(steps)
    assert found["configured"]["overrides"] == []
    again = tree_of(capsys, *SMALL_PLAN, *found["layouts"][0]["overrides"])
    assert again["configured"]["step_seconds"] == steps[0]
    assert all(layout["fits"] and layout["comm_sms"] == 20 for layout in found["layouts"])
    assert [phase["name"] for phase in found["phase_costs"]] == ["pre-training"]  # not DeepSeek's run
    assert 0.9 < found["effective_training_share"] < 1
    assert {"change", "step_seconds", "relative_change"} == set(found["sensitivity"][0])


def test_a_page_of_the_best_layout(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    best = tree_of(capsys, *SMALL_PLAN, "--html", str(page))["layouts"][0]
    text = page.read_text()
    assert f"{best['step_seconds']:.3f}" in text
    assert text.count("<svg") == 2
    assert "--html" in answer(capsys, *SMALL_PLAN, "--html", str(tmp_path), code=2)


def test_a_plan_without_a_layout_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert "best layout: none (no layout is legal and fits)" in answer(capsys, *SMALL_PLAN, "cluster.memory_gb=5")


def test_three_renderings_show_the_same_numbers() -> None:
    check_renderings(plan_answer(plan(SMALL_PLAN[1:], None, 5)), smallest_number_of_quantities=60)
