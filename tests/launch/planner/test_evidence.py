"""The evidence behind each figure of a forecast."""

from shoestring.launch.planner.evidence import list_assumptions
from shoestring.launch.verbs.simulate import simulate

V3 = "experiment=deepseek_v3_h800"


def test_nothing_is_measured_with_a_borrowed_table() -> None:
    simulation = simulate([V3, "cluster=h100"], None, {})
    costs = simulation.forecaster.chunk_time_model(simulation.layout, simulation.forecast.recipe)
    rows = list_assumptions(simulation.config, simulation.forecast, costs)
    assert "measured" not in {evidence for what, evidence, _ in rows if not what.startswith("cluster.")}
    assert set(simulation.forecast.evidence_coverage.evidence_shares()) == {"assumed"}
