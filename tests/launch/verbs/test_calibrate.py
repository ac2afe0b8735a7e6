"""`shoestring calibrate`: the phases of a step separated, and a table that the planner prices with."""

from pathlib import Path

import pytest
import torch

from shoestring.launch.compose import compose_run_config
from shoestring.launch.planner.evidence import list_assumptions
from shoestring.launch.planner.forecast import StepForecaster
from shoestring.launch.planner.kernel_times import KernelMeasurement, read_kernel_table
from shoestring.launch.planner.operations import ComputePhase
from shoestring.launch.planner.recipe import RECOMPUTE_NOTHING, GemmPrecision
from shoestring.launch.verbs.calibrate import calibrate, calibration_answer, recipe_measurements, write_cluster_config
from shoestring.launch.verbs.plan import plan
from shoestring.launch.verbs.simulate import simulate
from shoestring.parallelism.pipeline.chunk_walk import ExchangeOperation
from shoestring.tests.launch.refusals import refused
from shoestring.tests.launch.renderings import check_renderings


def test_impossible_numbers_are_refused_before_a_process_starts(tmp_path: Path) -> None:
    found = refused(lambda: calibrate([], None, tmp_path / "out", ranks=0, repeats=0))
    assert set(found) == {"--ranks", "--repeats"}
    assert not (tmp_path / "out").exists()


def test_what_would_be_measured_as_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(*overrides: str) -> dict[str, str]:
        return refused(calibrate, list(overrides), None, tmp_path / "out", 1, 1)

    assert set(said("precision=fp8")) == {"precision.linear"}
    assert set(said("precision=fp64", "exchange=deepep")) == {"precision.compute", "exchange.name"}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert "use cpu, or a cluster with GPU kernel times" in said()["training.device"]
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_is_refused_before_a_process_starts(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot be created" in refused(calibrate, [], None, tmp_path / "file", 1, 1)["--output"]


@pytest.mark.parametrize("name", ["my run: second", "a # b", "${x}", "it's"])
def test_a_cluster_is_read_back_from_wherever_it_lies(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    (folder / "cluster").mkdir(parents=True)
    rows = list(recipe_measurements(compose_run_config([])))
    assert write_cluster_config(folder, rows, 2) == folder / "cluster" / "measured.yaml"
    cluster = compose_run_config(["cluster=measured"], folder).cluster
    assert (cluster.name, cluster.total_gpus, cluster.tables) == ("measured", 2, str(folder / "measured.csv"))
    assert read_kernel_table(str(cluster.tables)).measured_recipe == {
        "precision": "fp32",
        "recompute": "nothing",
        "exchange": "flat (all native)",
        "optimizer.moments": "4 bytes per parameter",
    }


@pytest.mark.parametrize(
    ("overrides", "inputs", "field"),
    [
        (["recompute=deepseek_v3"], {}, "recompute"),
        (["precision=bf16"], {}, "precision"),
        (["exchange=two_hop"], {}, "exchange"),
        (["optimizer.moments=float32"], {}, "optimizer.moments"),
        ([], {"skew": 0.2}, "--skew"),
        ([], {"comm_sms": 20}, "--comm-sms"),
    ],
)
def test_what_was_not_measured_is_refused(
    tmp_path: Path, overrides: list[str], inputs: dict[str, float], field: str
) -> None:
    (tmp_path / "cluster").mkdir()
    write_cluster_config(tmp_path, [*recipe_measurements(compose_run_config([])), *invented(1)], 1)
    assert simulate(["cluster=measured"], tmp_path, {}).forecast.step_seconds > 0
    assert set(refused(simulate, ["cluster=measured", *overrides], tmp_path, inputs)) == {field}


def test_a_search_keeps_to_what_was_measured(tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    write_cluster_config(tmp_path, [*recipe_measurements(compose_run_config([])), *invented(2)], 2)
    found = plan(["cluster=measured", "topology.edp=2"], tmp_path, 3)
    assert found.best_layout is not None
    assert {(kept.recipe.precision, kept.recipe.recompute) for kept in found.search_result.best_forecasts} == {
        (GemmPrecision.FP32, RECOMPUTE_NOTHING)
    }
    assert {kept.layout.micro_batch_size for kept in found.search_result.best_forecasts} == {1}
    assert found.search_result.missing_figures == {
        "cluster.tables does not say enough": found.search_result.missing_figures.total()
    }
    assert not any("links" in change or "rows" in change for change in found.what_ifs)
    best = found.best_layout.forecast
    costs = StepForecaster(found.config.model, found.config.cluster, 128).chunk_time_model(best.layout, best.recipe)
    rows = list_assumptions(found.config, best, costs)
    assert not any("trace" in source for _, _, source in rows)


def invented(ranks: int) -> list[KernelMeasurement]:
    """Return kernel times of 100 µs per phase, for one sequence of 128 tokens per micro-batch."""
    shapes = [f"1x128/{count}" for count in {1, ranks}]
    names = [(name, shape) for name in (*ComputePhase, *ExchangeOperation) for shape in shapes]
    names += [(name, "any") for name in ("optimizer", "reduce", "step")]
    rows = [
        KernelMeasurement("phase", name, role, "any", 0, 0, 0, 100.0, "us", "measured", "a test")
        for name, role in names
    ]
    return [*rows, KernelMeasurement("edge", "message", "1x128", "any", 0, 0, 0, 10.0, "us", "measured", "a test")]


@pytest.mark.slow
def test_a_calibrated_machine_prices_the_layouts_of_its_ranks(tmp_path: Path) -> None:
    small = ["model.num_hidden_layers=2", "training.sequence_length=32", "training.global_batch_size=4"]
    cluster = calibrate(small, None, tmp_path, ranks=2, repeats=2)
    assert cluster == tmp_path / "cluster" / "measured.yaml"
    assert {row.evidence for row in read_kernel_table(str(tmp_path / "measured.csv")).rows} == {"measured"}
    for layout in (["topology.edp=2"], ["topology.ep=2"], ["topology.pp=2"], ["topology.pp=2", "schedule=zb_h1"]):
        forecast = simulate([*small, *layout, "cluster=measured"], tmp_path, {}).forecast
        assert not forecast.evidence_coverage.substituted_rows
        assert set(forecast.evidence_coverage.seconds_by_evidence) == {"measured"}
        assert 1e-3 < forecast.step_seconds < 60


def test_three_renderings_show_the_same_numbers(tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    rows = [*recipe_measurements(compose_run_config([])), *invented(1)]
    written = write_cluster_config(tmp_path, rows, 1)
    check_renderings(calibration_answer(written, tmp_path), smallest_number_of_quantities=len(ComputePhase))
