"""The forecast is of the configured run, or an error."""

from dataclasses import replace

import pytest

from shoestring.comm.topology import Topology
from shoestring.launch.compose import compose_run_config
from shoestring.launch.planner.config_adapter import (
    config_with_layout,
    diff_overrides,
    layout_from_config,
    recipe_from_config,
)
from shoestring.launch.planner.evidence import list_assumptions
from shoestring.launch.planner.forecast import ParallelLayout
from shoestring.launch.planner.published import is_deepseek_v3_layout
from shoestring.launch.planner.recipe import RECOMPUTE_NOTHING, ForecastRecipe, GemmPrecision
from shoestring.launch.planner.search import SearchSpace
from shoestring.launch.verbs.plan import plan
from shoestring.launch.verbs.simulate import simulate
from shoestring.tests.launch.planner.v3 import simulated
from shoestring.tests.launch.refusals import refused

V3 = "experiment=deepseek_v3_h800"


def test_the_experiment_is_the_reports_run() -> None:
    assert simulated().forecast.recipe == ForecastRecipe()
    assert simulated().is_deepseek_v3_layout


@pytest.mark.parametrize(
    "change",
    [
        "precision=bf16",
        "recompute=nothing",
        "recompute.modules=[up_projection,attention]",
        "exchange=flat",
        "exchange.dispatch=bf16",
        "exchange=deepep",
        "schedule.overlap=false",
        "optimizer.moments=float32",
    ],
)
def test_every_choice_changes_the_price(change: str) -> None:
    base, changed = simulated(), simulate([V3, change], None, {})
    figures = [(s.forecast.step_seconds, s.forecast.peak_memory.total) for s in (base, changed)]
    assert figures[0] != figures[1]
    assert not changed.is_deepseek_v3_layout
    assert not is_deepseek_v3_layout(changed.config, changed.layout, changed.forecast.recipe)


def test_deepep_lends_what_it_is_asked_for_and_its_pace_is_assumed() -> None:
    simulation = simulate([V3, "exchange=deepep"], None, {})
    assert simulation.forecast.recipe.comm_sms == 6
    rows = {what: evidence for what, evidence, _ in found(simulation.forecast.recipe, "exchange=deepep")}
    assert rows["6 SMs reserved for communication"] == "chosen"
    assert rows["all-to-alls as fast as with 20 SMs"] == "assumed"
    assert rows["DeepEP's buffer"] == "published"
    assert not any("buffers of all-to-alls" in what for what in rows)
    sources = {what: source for what, _, source in found(ForecastRecipe())}
    assert "loss.py moves 44.5 GB per micro-batch" in sources["memory passes of the head are free"]
    rows = {what: evidence for what, evidence, _ in found(ForecastRecipe())}
    assert rows["20 SMs reserved for communication"] == "measured"
    assert rows["NCCL's buffers of all-to-alls 1 GB"] == "assumed"
    assert not any(what.startswith("all-to-alls as fast") for what in rows)


def found(recipe: ForecastRecipe, *overrides: str) -> list[tuple[str, str, str]]:
    simulation = simulate([V3, *overrides], None, {})
    assert simulation.forecast.recipe == recipe
    return list_assumptions(
        simulation.config, simulation.forecast, simulation.forecaster.chunk_time_model(simulation.layout, recipe)
    )


@pytest.mark.parametrize(
    ("override", "field", "hint"),
    [
        ("precision=fp32", "precision.compute", "use precision=bf16 or precision=fp8"),
        ("precision=fp64", "precision.compute", "no table has FP64 times"),
        ("precision.fp8_backend=reference", "precision.fp8_backend", "use precision.fp8_backend=auto"),
        ("exchange.check_order=true", "exchange.check_order", "use false"),
        ("training.device=cpu", "training.device", "use auto or cuda"),
        ("topology.gpus_per_node=4", "topology.gpus_per_node", "use topology.gpus_per_node=8"),
        ("cluster.nodes=128", "cluster.nodes", "topology of 1024 ranks, or cluster.nodes=256"),
        ("cluster.tables=null", "cluster.tables", "`shoestring calibrate`"),
    ],
)
def test_what_cannot_be_priced_is_refused(override: str, field: str, hint: str) -> None:
    said = refused(simulate, [V3, override], None, {})
    assert set(said) == {field}
    assert hint in said[field]


@pytest.mark.parametrize(
    ("inputs", "field"),
    [
        ({"comm_sms": 132}, "--comm-sms"),
        ({"comm_sms": 5}, "--comm-sms"),
        ({"skew": -1.0}, "--skew"),
        ({"jitter": -0.1}, "--jitter"),
        ({"fragmentation": -0.1}, "--fragmentation"),
    ],
)
def test_impossible_inputs_are_refused(inputs: dict[str, float], field: str) -> None:
    assert set(refused(simulate, [V3], None, inputs)) == {field}


def test_sms_that_no_table_knows_of_are_refused() -> None:
    overrides = ["model=deepseek_v3", "data.vocab_size=129280", "cluster=b200", "topology.ep=8", "precision=bf16"]
    config = compose_run_config(overrides)
    assert recipe_from_config(config, {}).comm_sms == 0
    assert (
        "depends on SMs reserved for communication"
        in refused(recipe_from_config, config, {"comm_sms": 20})["--comm-sms"]
    )


def test_what_to_write_makes_the_layout() -> None:
    config = compose_run_config([V3])
    recipe = replace(recipe_from_config(config, {}), precision=GemmPrecision.BF16, recompute=RECOMPUTE_NOTHING)
    layout = ParallelLayout(Topology(pp=8, edp=4, ep=64), "dualpipev", 2)
    written = diff_overrides(config, config_with_layout(config, layout, recipe))
    ramp = ("training.rampup_start_batch_size=8192", "training.rampup_batch_size_increment=1024")
    again = compose_run_config([V3, *ramp, *written])
    assert layout_from_config(again) == layout
    assert recipe_from_config(again, {}) == recipe
    assert (
        diff_overrides(config, config_with_layout(config, layout_from_config(config), recipe_from_config(config, {})))
        == []
    )


def test_no_candidate_recomputes_gate_up_in_fp8() -> None:
    """`train` refuses it; the search asks the same check."""
    config = compose_run_config([V3])
    candidates = SearchSpace(2048, 8, micro_batches=(1,)).candidates(recipe_from_config(config, {}))
    own = [recipe for layout, recipe in candidates if layout == layout_from_config(config)]
    legal = [
        recipe for recipe in own if not any(config_with_layout(config, layout_from_config(config), recipe).problems())
    ]
    assert len(own) == 8
    assert len(legal) == 7


def test_a_search_lends_no_exchange_too_few_sms() -> None:
    """The configured run has no exchange, so `--comm-sms 3` is legal for it; layouts with an exchange refuse it."""
    grid = ["cluster.nodes=1", "topology.pp=8", "topology.edp=1", "topology.ep=1", "model.num_hidden_layers=8"]
    batch = [
        "training.global_batch_size=64",
        *(f"training.rampup_{name}" for name in ("start_batch_size=null", "batch_size_increment=null", "tokens=0")),
    ]
    found = plan([V3, *grid, *batch, "model.n_routed_experts=64"], None, 3, {"comm_sms": 3}).search_result
    assert any(reason.startswith("--comm-sms") for reason in found.illegal)
    assert {best.layout.topology.ep for best in found.best_forecasts} <= {1}
