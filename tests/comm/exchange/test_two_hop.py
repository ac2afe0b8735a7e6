"""Two hops against the flat exchange: equal results and gradients, and the minimum of bytes between nodes."""

from dataclasses import replace
from datetime import timedelta

import pytest
import torch

from shoestring.comm.exchange.config import ExchangeConfig
from shoestring.comm.groups import ProcessGroups
from shoestring.comm.topology import LinkType, Topology
from shoestring.comm.traffic import TrafficKind
from shoestring.tests.comm.exchange.routing import (
    CASES,
    EXPERTS,
    WIDTH,
    batch_of,
    open_on,
    relative_error,
    through_experts,
)
from shoestring.tests.processes import World, run_processes

GRIDS = [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1), (2, 4), (4, 2)]
NATIVE = ExchangeConfig()
FP8 = ExchangeConfig(dispatch="fp8", combine="bf16", combine_backward="fp8", dispatch_backward="bf16")
FORMATS = {
    "fp64": (torch.float64, NATIVE),
    "fp32": (torch.float32, NATIVE),
    "bf16": (torch.bfloat16, NATIVE),
    "fp8": (torch.float32, FP8),
}
# Largest ‖Δ‖ / ‖reference‖ of a tensor. BF16 rounds a number by 2^-9 of it at most. Between the two exchanges there are
# five such roundings of sums: flat's copies and result, and here the sum of a rank, of a node, and the result.
# Towards the experts both round alike, in FP8 too, so that the same bound holds for it.
BOUNDS = {"fp64": 1e-12, "fp32": 1e-6, "bf16": 5 * 2**-9, "fp8": 5 * 2**-9}


def compare(world: World, gpus_per_node: int) -> dict[tuple[str, str, str], float]:
    """Return the relative error of two hops against flat for each format, case and tensor."""
    topology = Topology(ep=world.size, gpus_per_node=gpus_per_node)
    groups = ProcessGroups.create(topology, world.rank, timedelta(seconds=30))
    errors = {}
    for form, (dtype, formats) in FORMATS.items():
        exchanges = [
            open_on(topology, world.rank, replace(formats, name=name), groups)[0] for name in ("two_hop", "flat")
        ]
        for case in CASES:
            batch = batch_of(case, topology, world.rank, dtype)
            ours, reference = (dict(through_experts(exchange, batch, topology, world.rank)) for exchange in exchanges)
            for name, tensor in ours.items():
                assert tensor.dtype == reference[name].dtype
                errors[form, case.name, name] = relative_error(tensor, reference[name])
    return errors


@pytest.mark.parametrize(("nodes", "gpus_per_node"), GRIDS)
def test_two_hop_equals_flat(nodes: int, gpus_per_node: int) -> None:
    for errors in run_processes(nodes * gpus_per_node, compare, gpus_per_node, timeout=120):
        wrong = {key: error for key, error in errors.items() if not error <= BOUNDS[key[0]]}
        assert not wrong
        assert len(errors) == len(FORMATS) * len(CASES) * 4


def distance_of_fp8(world: World) -> list[dict[str, float]]:
    topology = Topology(ep=world.size, gpus_per_node=2)
    groups = ProcessGroups.create(topology, world.rank, timedelta(seconds=30))
    result = []
    for name in ("flat", "two_hop"):
        exact, _, _ = open_on(topology, world.rank, replace(NATIVE, name=name), groups)
        rounded, _, _ = open_on(topology, world.rank, replace(FP8, name=name), groups)
        batch = batch_of(CASES[3], topology, world.rank, torch.float32)
        ours, reference = (dict(through_experts(x, batch, topology, world.rank)) for x in (rounded, exact))
        result.append({key: relative_error(ours[key], reference[key]) for key in ours})
    return result


def test_fp8_rounds_to_a_sixteenth_at_most_and_does_round() -> None:
    for per_exchange in run_processes(4, distance_of_fp8):
        for errors in per_exchange:
            # Gates and experts multiply a rounded activation with a rounded gradient.
            assert all(2**-8 < error < 2**-4 + 2**-8 for key, error in errors.items() if "experts" not in key), errors
            assert errors["experts' gradient"] < 2 * (2**-4 + 2**-8)


def payload_between_nodes(world: World, gpus_per_node: int, form: str) -> list[tuple[dict[str, int], int]]:
    """Return the bytes by operation and the rows that must cross: one per token and node with an expert of it."""
    topology = Topology(ep=world.size, gpus_per_node=gpus_per_node)
    groups = ProcessGroups.create(topology, world.rank, timedelta(seconds=30))
    dtype, formats = FORMATS[form]
    result = []
    for case in CASES:
        exchange, traffic, _ = open_on(topology, world.rank, replace(formats, name="two_hop"), groups)
        batch = batch_of(case, topology, world.rank, dtype)
        dict(through_experts(exchange, batch, topology, world.rank))
        experts_of_node = EXPERTS // topology.nodes_per_ep_group
        own = world.rank // gpus_per_node
        rows = sum(len({expert // experts_of_node for expert in row} - {own}) for row in batch.experts_TK.tolist())
        operations = ("dispatch", "combine", "combine_backward", "dispatch_backward")
        counted = {name: traffic.bytes_by_link(TrafficKind.PAYLOAD, name)[LinkType.INFINIBAND] for name in operations}
        result.append((counted, rows))
    return result


@pytest.mark.parametrize(
    ("form", "out", "back"), [("bf16", 2 * WIDTH, 2 * WIDTH), ("fp8", WIDTH + 2, 2 * WIDTH)], ids=["bf16", "fp8"]
)
def test_payload_between_nodes_is_the_minimum(form: str, out: int, back: int) -> None:
    everyone = run_processes(8, payload_between_nodes, 2, form, timeout=120)
    for case in zip(*everyone, strict=True):
        for counted, rows in case:
            assert counted["dispatch"] == counted["combine_backward"] == rows * out
        # On combine the other side sends: every row that crossed comes back once.
        crossed = sum(rows for _, rows in case)
        for operation in ("combine", "dispatch_backward"):
            assert sum(counted[operation] for counted, _ in case) == crossed * back
    assert sum(rows for result in everyone for _, rows in result) > 0
