"""Rows that stay in FP8: the numbers and scales that were sent, in the order of the rows."""

from dataclasses import replace
from datetime import timedelta

import pytest
import torch

from shoestring.comm.exchange.api import DispatchedTokens, TokenExchange
from shoestring.comm.exchange.config import ExchangeConfig
from shoestring.comm.fp8 import dequantize, nan_placeholder
from shoestring.comm.groups import ProcessGroups
from shoestring.comm.topology import Topology
from shoestring.tests.comm.exchange.routing import CASES, LABEL, WIDTH, Batch, batch_of, open_on
from shoestring.tests.processes import World, run_processes

FP8 = ExchangeConfig(dispatch="fp8", combine="bf16", combine_backward="fp8", dispatch_backward="bf16")


def received(exchange: TokenExchange[object], batch: Batch, *, as_tiles: bool) -> DispatchedTokens[object]:
    return exchange.dispatch(batch.tokens_TD, batch.weights_TK, batch.experts_TK, LABEL, keep_quantized=as_tiles).wait()


def both_ways(world: World, name: str, dtype: torch.dtype) -> int:
    """Return the number of received rows. The quantized rows must equal the plain ones to the last bit."""
    topology = Topology(ep=world.size, gpus_per_node=2)
    groups = ProcessGroups.create(topology, world.rank, timedelta(seconds=30))
    exchange, traffic, _ = open_on(topology, world.rank, replace(FP8, name=name), groups)
    count = 0
    for case in CASES:
        batch = batch_of(case, topology, world.rank, dtype)
        traffic.reset()
        plain = received(exchange, batch, as_tiles=False)
        sent = dict(traffic.bytes_sent)
        traffic.reset()
        ours = received(exchange, batch, as_tiles=True)
        assert traffic.bytes_sent == sent
        assert plain.quantized_rows is None
        assert ours.quantized_rows is not None
        values_RD, exponents_RQ = ours.quantized_rows.values_XD, ours.quantized_rows.exponents_XQ
        assert values_RD.is_contiguous()
        assert exponents_RQ.shape == (len(values_RD), 2)
        assert torch.equal(dequantize(values_RD, exponents_RQ, dtype), plain.rows_RD)
        assert torch.equal(ours.gate_weights_R, plain.gate_weights_R)
        assert (ours.rows_per_expert_L, ours.token_counts) == (plain.rows_per_expert_L, plain.token_counts)
        assert (ours.rows_RD.shape, ours.rows_RD.dtype) == (plain.rows_RD.shape, dtype)
        assert ours.rows_RD.isnan().all()
        assert ours.without_rows().quantized_rows is None
        back, expected = (exchange.combine(plain.rows_RD, way).wait() for way in (ours, plain))
        assert torch.equal(back, expected)
        count += len(values_RD)
    return count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["flat", "two_hop"])
def test_tiles_are_the_rows_as_they_crossed(name: str, dtype: torch.dtype) -> None:
    assert sum(run_processes(4, both_ways, name, dtype)) > 100


def rows_stay_plain(world: World, name: str) -> list[bool]:
    """Return, for the compute dtype and BF16, whether only plain rows arrive."""
    topology = Topology(ep=world.size)
    groups = ProcessGroups.create(topology, world.rank, timedelta(seconds=30))
    formats = ("native", "bf16") if world.size > 1 else ("native", "fp8")
    found = []
    for form in formats:
        exchange, _, _ = open_on(topology, world.rank, replace(FP8, name=name, dispatch=form), groups)
        batch = batch_of(CASES[2], topology, world.rank, torch.float32)
        ours, plain = (received(exchange, batch, as_tiles=as_tiles) for as_tiles in (True, False))
        found.append(ours.quantized_rows is None and torch.equal(ours.rows_RD, plain.rows_RD))
    return found


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["flat", "two_hop"])
def test_rows_that_do_not_cross_in_fp8_are_rows(name: str, ranks: int) -> None:
    """A single rank sends nothing, in any wire format."""
    assert run_processes(ranks, rows_stay_plain, name) == [[True, True]] * ranks


@pytest.mark.parametrize("rows", [0, 5])
def test_a_stand_in_takes_no_memory_and_is_no_number(rows: int) -> None:
    values_XD = torch.zeros(rows, WIDTH).to(torch.float8_e4m3fn)
    rows_XD = nan_placeholder(values_XD, torch.bfloat16)
    assert (rows_XD.shape, rows_XD.dtype) == (values_XD.shape, torch.bfloat16)
    assert rows_XD.isnan().all()
    assert rows_XD.untyped_storage().nbytes() == 2
