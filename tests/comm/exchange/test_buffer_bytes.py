"""Predicted buffers of a dispatch against every allocation of a real one."""

from datetime import timedelta

import pytest
import torch

from shoestring.comm.async_comm import InlineCommunicator
from shoestring.comm.exchange.buffer_bytes import ExchangeShape
from shoestring.comm.exchange.config import ExchangeConfig
from shoestring.comm.exchange.factory import build_token_exchange, exchange_buffer_bytes
from shoestring.comm.exchange.flat import routing_table_bytes
from shoestring.comm.groups import ProcessGroups
from shoestring.comm.topology import Topology
from shoestring.comm.trace import ExchangeLabel
from shoestring.comm.traffic import TrafficCounter
from shoestring.tests.processes import World, run_processes
from shoestring.trainer.memory.measured import open_allocation_meter
from shoestring.trainer.model.config import ModelConfig

CPU = torch.device("cpu")
TOKENS = 512
CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=512,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_group=1,
    topk_group=1,
    num_nextn_predict_layers=0,
)


def measured(world: World, config: ExchangeConfig, as_tiles: bool) -> tuple[int, int, int]:
    """Return the received rows, the bytes that they keep, and the peak bytes."""
    topology = Topology(ep=world.size, gpus_per_node=1)
    groups = ProcessGroups.create(topology, world.rank, timedelta(seconds=30))
    traffic = TrafficCounter(topology, world.rank)
    exchange = build_token_exchange(config, groups, CONFIG.n_routed_experts, InlineCommunicator(), traffic)
    generator = torch.Generator().manual_seed(world.rank)
    tokens_TD = torch.randn(TOKENS, CONFIG.hidden_size, generator=generator).to(torch.bfloat16)
    weights_TK = torch.rand(TOKENS, CONFIG.num_experts_per_tok, generator=generator)
    experts_TK = (
        torch.rand(TOKENS, CONFIG.n_routed_experts, generator=generator).topk(CONFIG.num_experts_per_tok).indices
    )
    with open_allocation_meter(CPU) as meter:
        meter.start()
        received = exchange.dispatch(
            tokens_TD, weights_TK, experts_TK, ExchangeLabel("layer_01", 0), keep_quantized=as_tiles
        ).wait()
        _, peak = meter.stop()
    tiles = received.quantized_rows
    parts = [received.rows_RD] if tiles is None else [received.rows_RD, tiles.values_XD, tiles.exponents_XQ]
    return len(received.rows_RD), sum(part.untyped_storage().nbytes() for part in parts), peak


@pytest.mark.parametrize("name", ["flat", "two_hop"])
def test_rows_that_stay_in_fp8_take_what_is_predicted(name: str) -> None:
    exchange = ExchangeConfig(name=name, dispatch="fp8")
    widened = run_processes(2, measured, exchange, False)
    for (rows, left, peak), (_, _, before) in zip(run_processes(2, measured, exchange, True), widened, strict=True):
        shape = ExchangeShape(
            exchange, 2, TOKENS, CONFIG.num_experts_per_tok, rows, CONFIG.hidden_size, torch.bfloat16, fp8_experts=True
        )
        buffers = exchange_buffer_bytes(shape)
        assert left == pytest.approx(buffers.dispatched_row_bytes, abs=2)  # the placeholder of the plain rows
        predicted = buffers.dispatch + routing_table_bytes(TOKENS, CONFIG.num_experts_per_tok, rows)
        print(f"{name}: {peak:,} bytes, predicted {predicted:,.0f} ({predicted / peak - 1:+.1%}); widened {before:,}")
        assert peak == pytest.approx(predicted, rel=0.05)
        assert peak < 0.6 * before
