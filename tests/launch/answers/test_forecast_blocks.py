"""Blocks that `simulate` and `plan` share: pictures and costs."""

import argparse
from xml.etree import ElementTree

import pytest

from shoestring.launch.answers.blocks import Quantity, TableBlock
from shoestring.launch.answers.forecast_blocks import (
    add_input_arguments,
    forecast_figures,
    given_inputs,
    phase_cost_blocks,
    phase_cost_data,
)
from shoestring.launch.planner.layout_memory import memory_by_kind
from shoestring.launch.planner.run_cost import RunPhaseCost
from shoestring.launch.verbs.simulate import simulate

SVG = "{http://www.w3.org/2000/svg}"


def test_every_kind_of_memory_of_every_rank_is_drawn() -> None:
    forecast = simulate(["experiment=deepseek_v3_h800"], None, {}).forecast
    timeline, memory = forecast_figures(forecast, 84.94)
    words = [each.text for each in ElementTree.fromstring(timeline.drawn).iter(f"{SVG}text")]
    assert "seconds" in words  # the unit of the axis
    root = ElementTree.fromstring(memory.drawn)
    kinds = memory_by_kind(forecast.peak_memory)
    assert len(list(root.iter(f"{SVG}rect"))) == 16 * len(kinds)
    assert len(memory.legend) == len(kinds)
    totals = [each.text for each in root.iter(f"{SVG}text") if (each.text or "").endswith(" GB")]
    assert totals == [f"{each.total / 1e9:.1f} GB" for each in forecast.memory_by_rank]
    (limit,) = root.iter(f"{SVG}line")
    assert float(limit.attrib["x1"]) > max(
        float(box.attrib["x"]) + float(box.attrib["width"]) for box in root.iter(f"{SVG}rect")
    )
    *_, without_limit = forecast_figures(forecast, None)
    assert not list(ElementTree.fromstring(without_limit.drawn).iter(f"{SVG}line"))


def test_costs_have_a_total_and_notes() -> None:
    phases = [RunPhaseCost("ramp", 100.0, "simulated", "from 1; to 2"), RunPhaseCost("later", 50.0, "published")]
    costs, notes = (block for block in phase_cost_blocks(phases, 2.0) if isinstance(block, TableBlock))
    assert costs.rows[-1].is_total
    assert costs.rows[-1].cells[:3] == ["total", Quantity(150.0, "150"), Quantity(300.0, "300")]
    assert [row.cells for row in notes.rows] == [("ramp", "from 1\nto 2")]
    data = phase_cost_data(phases, 2.0)
    assert (data["total_gpu_hours"], data["total_usd"]) == (150.0, 300.0)
    assert phase_cost_data(phases, None)["total_usd"] is None
    priceless, _ = (block for block in phase_cost_blocks(phases, None) if isinstance(block, TableBlock))
    assert {row.cells[2] for row in priceless.rows} == {"-"}


@pytest.mark.parametrize(
    ("arguments", "inputs"), [([], {}), (["--skew", "0.2", "--comm-sms", "20"], {"skew": 0.2, "comm_sms": 20})]
)
def test_only_given_inputs_reach_the_recipe(arguments: list[str], inputs: dict[str, float]) -> None:
    parser = argparse.ArgumentParser()
    add_input_arguments(parser)
    assert given_inputs(parser.parse_args(arguments)) == inputs
