"""Bytes of an exchange: each token once per node, then once per rank."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import pytest

from shoestring.comm.exchange.config import ExchangeConfig
from shoestring.launch.planner.exchange_time import (
    ExchangeTimeModel,
    expected_destinations_per_token,
)
from shoestring.launch.planner.kernel_times import EvidenceCoverage, read_kernel_table
from shoestring.launch.planner.operations import LayerWorkload
from shoestring.launch.planner.recipe import DEEPSEEK_V3_EXCHANGE, ForecastRecipe
from shoestring.launch.verbs.simulate import simulate
from shoestring.parallelism.pipeline.chunk_walk import ExchangeOperation
from shoestring.trainer.model.config import ModelConfig

from .v3 import simulated


def choices(model: ModelConfig) -> Iterator[tuple[int, ...]]:
    """Yield every choice of experts that a token may make, as often as uniform routing makes it."""
    size = model.n_routed_experts // model.n_group
    for groups in combinations(range(model.n_group), model.topk_group):
        yield from combinations([group * size + e for group in groups for e in range(size)], model.num_experts_per_tok)


@pytest.mark.parametrize("places", [1, 2, 4, 8])
@pytest.mark.parametrize(("groups", "chosen", "top_k"), [(4, 2, 2), (4, 2, 3), (2, 1, 2), (4, 4, 3), (1, 1, 2)])
def test_expected_visits_are_those_of_all_choices(places: int, groups: int, chosen: int, top_k: int) -> None:
    model = ModelConfig(n_routed_experts=8, n_group=groups, topk_group=chosen, num_experts_per_tok=top_k)
    all_choices = list(choices(model))
    share = model.n_routed_experts // places
    mean = sum(len({expert // share for expert in choice}) for choice in all_choices) / len(all_choices)
    assert expected_destinations_per_token(model, places) == pytest.approx(mean)


def test_v3_crosses_to_fewer_nodes_than_experts() -> None:
    model = simulated().config.model
    assert 3.5 < expected_destinations_per_token(model, 8) <= 4  # of at most 4 nodes
    assert expected_destinations_per_token(model, 64) < 8


def test_fp8_rows_go_out_and_bf16_sums_come_back() -> None:
    simulation = simulated()
    costs = simulation.forecaster.chunk_time_model(simulation.layout, simulation.forecast.recipe)
    out, back = (
        costs.exchange_model.bytes_by_link(costs.shape, exchange)[0]
        for exchange in (ExchangeOperation.DISPATCH, ExchangeOperation.COMBINE)
    )
    assert out / back == pytest.approx(7392 / 14336)  # bytes per token (report §3.3, DeepEP)


def test_during_compute_an_exchange_takes_what_the_trace_took() -> None:
    simulation = simulated()
    costs = simulation.forecaster.chunk_time_model(simulation.layout, simulation.forecast.recipe)
    traced = {"dispatch": 4.3458, "combine": 5.9938, "combine_backward": 3.4052, "dispatch_backward": 6.3682}
    for exchange in ExchangeOperation:
        travel = costs.exchange_model.exchange_time(costs.shape, exchange)
        assert travel.overlapped_seconds * 1e3 == pytest.approx(traced[exchange.value])
        assert travel.standalone_seconds < travel.overlapped_seconds


@pytest.mark.parametrize("node", [2, 4])
def test_smaller_nodes_than_the_traced_ones_are_priced(node: int) -> None:
    """More nodes for the same 64 expert ranks mean more traffic between nodes."""
    of_eight = simulated()
    smaller = [f"topology.gpus_per_node={node}", f"cluster.gpus_per_node={node}", f"cluster.nodes={2048 // node}"]
    found = simulate(["experiment=deepseek_v3_h800", *smaller], None, {})
    assert (
        found.forecast.mean_time_terms["exposed_all_to_all"] > of_eight.forecast.mean_time_terms["exposed_all_to_all"]
    )


def test_flat_sends_a_row_for_every_expert() -> None:
    model = simulated().config.model
    flat, once = wire(exchange=ExchangeConfig(name="flat")), wire(exchange=ExchangeConfig(name="two_hop"))
    shape = LayerWorkload(model, 4096, 1, 64)
    sent = flat.bytes_by_link(shape, ExchangeOperation.DISPATCH)
    assert sent == pytest.approx((4096 * 7168 * 2 * 8 * 7 / 8, 4096 * 7168 * 2 * 8 * 7 / 64))
    assert sent[0] > 1.9 * once.bytes_by_link(shape, ExchangeOperation.DISPATCH)[0]
    assert (
        flat.exchange_time(shape, ExchangeOperation.DISPATCH).standalone_seconds
        > once.exchange_time(shape, ExchangeOperation.DISPATCH).standalone_seconds
    )
    assert set(flat.coverage.seconds_by_evidence) == {"assumed"}


def test_rows_are_as_wide_as_their_format() -> None:
    shape = LayerWorkload(simulated().config.model, 4096, 1, 64)
    wide, narrow = (wire(exchange=replace(DEEPSEEK_V3_EXCHANGE, dispatch=name)) for name in ("native", "fp8"))
    assert wide.bytes_by_link(shape, ExchangeOperation.DISPATCH)[0] / narrow.bytes_by_link(
        shape, ExchangeOperation.DISPATCH
    )[0] == pytest.approx(64 / 33)


def test_only_the_traced_exchange_is_measured() -> None:
    model, evidence = simulated().config.model, {}
    for ranks in (64, 32, 8):
        own = wire()
        own.exchange_time(LayerWorkload(model, 4096, 1, ranks), ExchangeOperation.DISPATCH)
        evidence[ranks] = set(own.coverage.seconds_by_evidence)
    assert evidence == {64: {"measured"}, 32: {"published"}, 8: {"published"}}


def wire(**changes: object) -> ExchangeTimeModel:
    recipe, table = replace(ForecastRecipe(), **changes), read_kernel_table("h800")  # type: ignore[arg-type]
    return ExchangeTimeModel(simulated().config.cluster, recipe, table, EvidenceCoverage())
