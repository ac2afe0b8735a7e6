"""`shoestring budget --against`: a real run's ledger compared with the planner's forecast."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from shoestring.comm.errors import ConfigError
from shoestring.comm.groups import ProcessGroups
from shoestring.launch.compose import compose_run_config, config_to_yaml
from shoestring.launch.report.plan_comparison import PlanComparison, PlannedVsMeasured, compare_with_plan
from shoestring.launch.run.run_dir import CONFIG_FILE
from shoestring.tests.launch.command_line import answer
from shoestring.tests.launch.small_run import BATCH, SEQUENCE, small_run
from shoestring.tests.processes import World, run_processes
from shoestring.tests.trainer.telemetry.written_events import RUN_OF_FORMAT_1
from shoestring.trainer.build import build_stage_layout
from shoestring.trainer.ledger.summary import AttemptUsage, summarize_ledger
from shoestring.trainer.ledger.terms import STEP_TIME_TERMS, to_gpu_hours
from shoestring.trainer.loop import train
from shoestring.trainer.telemetry.memory_usage import ALLOCATED_LABEL

STEPS = 4
Tree = dict[str, Any]


def train_rank(world: World, overrides: list[str]) -> None:
    config = compose_run_config(overrides)
    groups = ProcessGroups.create(
        config.topology, world.rank, timedelta(seconds=60), build_stage_layout(config).replica_pp_groups()
    )
    train(config, groups, torch.device("cpu"), attempt="a")


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("against")
    return [*small_run(root, STEPS), f"training.run_dir={root / 'run'}", "telemetry.terms_every=1"]


@pytest.fixture(scope="module")
def run_dir(overrides: list[str]) -> Path:
    run_processes(2, train_rank, overrides)
    config = compose_run_config(overrides)
    run_dir = Path(config.training.run_dir)
    (run_dir / CONFIG_FILE).write_text(config_to_yaml(config))
    return run_dir


Write = Callable[[Tree], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_file(tree: Tree) -> Path:
        (tmp_path / "plan.json").write_text(json.dumps(tree))
        return tmp_path / "plan.json"

    return to_file


GPUS = ("cluster=h800", "cluster.nodes=1", "cluster.gpus_per_node=2", "training.device=auto", "recompute=deepseek_v3")


@pytest.fixture
def simulated(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> Tree:
    tree: Tree = json.loads(answer(capsys, "simulate", *overrides, *GPUS, "--format", "json"))
    return tree


def lines(comparison: PlanComparison) -> Iterator[PlannedVsMeasured]:
    yield from (*comparison.terms_seconds_a_step, comparison.step_seconds, *comparison.totals)


def test_terms_add_up_to_the_step_on_both_sides(run_dir: Path, simulated: Tree, write: Write) -> None:
    summary = summarize_ledger(run_dir)
    comparison = compare_with_plan(run_dir, summary, write(simulated))
    assert [line.name for line in comparison.terms_seconds_a_step] == [*STEP_TIME_TERMS, "other"]
    assert {line.name for line in comparison.terms_seconds_a_step if line.measured} >= {
        "F",
        "B",
        "exposed_all_to_all",
        "optimizer",
    }
    for side in ("planned", "measured", "difference"):
        values = [getattr(line, side) for line in comparison.terms_seconds_a_step]
        assert sum(values) == pytest.approx(getattr(comparison.step_seconds, side), rel=1e-9)
    seconds = summary.productive_ms / 1e3 / 2
    assert comparison.step_seconds.measured == pytest.approx(seconds / STEPS)
    totals = {line.name: line for line in comparison.totals}
    assert totals["tokens_per_second"].measured == pytest.approx(STEPS * BATCH * SEQUENCE / seconds)
    assert totals["tokens_per_second"].planned == pytest.approx(BATCH * SEQUENCE / simulated["layout"]["step_seconds"])
    assert totals["gpu_hours_of_steps"].measured == pytest.approx(to_gpu_hours(summary.productive_ms))
    assert totals["gpu_hours_of_steps"].planned == pytest.approx(
        STEPS * simulated["layout"]["step_seconds"] * 2 / 3600, rel=1e-6
    )
    assert totals["gpu_hours"].measured == summary.gpu_hours
    assert totals["memory_bytes"].measured is None  # of a CPU: resident memory, which is another quantity
    assert comparison.notes == []
    assert comparison.deviations == [
        "cluster: h800 planned, local run",
        "precision: bf16 planned, fp32 run",
        "recompute: norm+swiglu+up_projection planned, nothing run",
    ]


def test_what_is_left_is_priced_at_the_last_steps(run_dir: Path, simulated: Tree, write: Write) -> None:
    """A run of twice as many tokens, half done."""
    summary = summarize_ledger(run_dir)
    config = run_dir / CONFIG_FILE
    told = config.read_text()
    config.write_text(
        told.replace(f"tokens: {STEPS * BATCH * SEQUENCE}\n", f"tokens: {2 * STEPS * BATCH * SEQUENCE}\n")
    )
    try:
        comparison = compare_with_plan(run_dir, summary, write(simulated))
    finally:
        config.write_text(told)
    totals = {line.name: line.measured for line in comparison.totals}
    assert summary.step_ms_per_token is not None
    left = to_gpu_hours(1) * summary.step_ms_per_token * STEPS * BATCH * SEQUENCE
    assert totals["gpu_hours"] == pytest.approx(summary.gpu_hours + left)
    assert totals["gpu_hours_of_steps"] == pytest.approx(to_gpu_hours(summary.productive_ms) + left)
    assert "tokens: 1,024 planned, 2,048 run" in comparison.deviations


def test_memory_is_the_allocators_peak_on_the_fullest_rank(run_dir: Path, simulated: Tree, write: Write) -> None:
    summary, metrics = summarize_ledger(run_dir), run_dir / "metrics.jsonl"
    told = metrics.read_text()
    looks = [{"quantity": ALLOCATED_LABEL, "limit": 9, "now": [1, 1], "peak": peak} for peak in ([5, 4], [2, 3])]
    events = [{"time": 0.0, "kind": "memory", "step": step, **look} for step, look in enumerate(looks, 1)]
    metrics.write_text(told + "".join(json.dumps(event) + "\n" for event in events))
    try:
        comparison = compare_with_plan(run_dir, summary, write(simulated))
    finally:
        metrics.write_text(told)
    assert {line.name: line.measured for line in comparison.totals}["memory_bytes"] == 5


def test_table_and_json(
    run_dir: Path, simulated: Tree, write: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = answer(capsys, "budget", run_dir, "--against", write(simulated)).partition("Planned and measured")[2]
    for words in (
        "all-to-all not overlapped",
        "tokens/s",
        "GPU-hours, steps only",
        "not recorded",
        "Not as planned: cluster",
    ):
        assert words in text
    assert max(map(len, text.splitlines()[1:])) <= 80
    tree = json.loads(answer(capsys, "budget", run_dir, "--against", write(simulated), "--format", "json"))["against"]
    assert tree["layout"] == "the simulated layout"
    step = tree["step_seconds"]
    assert step["difference"] == step["measured"] - step["planned"]
    assert [line["name"] for line in tree["terms_seconds_a_step"]] == [*STEP_TIME_TERMS, "other"]


def test_of_a_search_it_is_the_layout_of_the_run(
    overrides: list[str], run_dir: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    tree: Tree = json.loads(answer(capsys, "plan", *overrides, *GPUS, "--format", "json"))
    summary = summarize_ledger(run_dir)
    of_run = tree["configured"]
    other = of_run | {"edp": 2, "ep": 1}
    tree["layouts"] = [other]
    assert compare_with_plan(run_dir, summary, write(tree)).layout == "the configured layout"
    # The fastest row has another layout; of the run's rows, one is priced in its precision.
    alike = of_run | {"precision": "fp32", "recompute": [], "step_seconds": 7.0}
    tree["layouts"] = [other, of_run, of_run, alike]
    found = compare_with_plan(run_dir, summary, write(tree))
    assert (found.layout, found.step_seconds.planned) == ("layout 4 of 4", 7.0)
    assert found.deviations == ["cluster: h800 planned, local run"]
    tree["layouts"] = [other, of_run, of_run]
    assert compare_with_plan(run_dir, summary, write(tree)).layout == "layout 2 of 3"
    tree["layouts"], tree["configured"] = [other], other
    with pytest.raises(
        ConfigError, match=r"does not contain the run's layout, pp1 edp1 ep2 dualpipev .*shoestring simulate"
    ):
        compare_with_plan(run_dir, summary, write(tree))


@pytest.mark.parametrize(
    ("path", "value", "gist"),
    [
        (("run", "model", "hidden_size"), 64, "is a plan for model.hidden_size=64, but the run has 32"),
        (("run", "global_batch_size"), 16, "is a plan for global_batch_size=16, but the run has 8"),
        (("run", "sequence_length"), 64, "is a plan for sequence_length=64, but the run has 32"),
        (("layout", "ep"), 1, "does not contain the run's layout"),
        (("layout", "schedule"), "zb_h1", "does not contain the run's layout"),
        (("layout", "time_terms"), {}, "is not a plan: layout.time_terms.F is missing"),
        (("run",), None, "is not a plan: run must be a mapping of keys"),
    ],
)
def test_a_plan_of_another_run_is_refused(
    path: tuple[str, ...], value: object, gist: str, run_dir: Path, simulated: Tree, write: Write
) -> None:
    node = simulated
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(ConfigError, match=gist):
        compare_with_plan(run_dir, summarize_ledger(run_dir), write(simulated))


def test_figures_of_more_than_one_kind_of_step_are_marked(run_dir: Path, simulated: Tree, write: Write) -> None:
    summary, plan = summarize_ledger(run_dir), write(simulated)
    elsewhere = replace(
        summary, attempt_usages=[*summary.attempt_usages, AttemptUsage("b", None, 4, 10, 40)], inherited_ms=5
    )
    grown = replace(elsewhere, tokens_by_phase={"pre_train": 100 * STEPS})
    assert list(compare_with_plan(run_dir, grown, plan).notes) == [
        "attempts on 4 ranks are in the measured figures, which assume 2",
        "mean tokens per step 100; planned 256",
        "the initial checkpoint's GPU-hours are in the total, not in those of steps",
    ]
    unseen = compare_with_plan(run_dir, replace(summary, gpu_ms_by_term={}), plan)
    assert all(line.measured is None for line in unseen.terms_seconds_a_step)
    assert unseen.step_seconds.measured is not None


def test_what_cannot_be_compared_is_refused(
    run_dir: Path, simulated: Tree, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = write(simulated)
    with pytest.raises(ConfigError, match="has no step to compare with yet"):
        compare_with_plan(run_dir, replace(summarize_ledger(run_dir), steps_retained=0), plan)
    with pytest.raises(
        ConfigError, match=r"config.yaml = None: cannot be used: No such file .*it holds the run's configuration"
    ):
        compare_with_plan(tmp_path, summarize_ledger(run_dir), plan)
    metrics = run_dir / "metrics.jsonl"
    told = metrics.read_text()
    metrics.write_text(RUN_OF_FORMAT_1)
    try:
        assert "reads metrics format 2; use the version" in answer(capsys, "budget", run_dir, "--against", plan, code=2)
    finally:
        metrics.write_text(told)
    plan.write_text("[]")
    assert "is not a plan" in answer(capsys, "budget", run_dir, "--against", plan, code=2)
    assert "cannot be read" in answer(capsys, "budget", run_dir, "--against", tmp_path / "absent", code=2)
    project = tmp_path / "project.yaml"
    project.write_text(f"gpu_hours: {{pre_train: 5}}\nruns: [{run_dir}]\n")
    assert "is for one run" in answer(capsys, "budget", project, "--against", plan, code=2)
