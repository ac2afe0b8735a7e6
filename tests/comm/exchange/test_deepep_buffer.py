"""The size of DeepEP's buffer against sizes derived by hand from its source."""

from dataclasses import replace

import pytest

from shoestring.comm.exchange.deepep_buffer import DeepEPBufferShape, deepep_buffer_bytes

V3 = DeepEPBufferShape(max_tokens_per_rank=4096, hidden_size=7168, top_k=8)
COMBINED = 14_336 + 64  # BF16 values; 8 indices and gates
WORKSPACE = 16 * 2**20  # 15.97 MB of counters in whole 2 MiB


def test_deepseek_v3_over_eight_nodes_is_sized_by_its_combine() -> None:
    inside, between, out = 8 * 8 * 4096, 8 * 4096, 8 * (4096 + 1280)
    exact = (inside + between + out) * COMBINED
    assert exact == pytest.approx(3.775e9 + 0.472e9 + 0.619e9, rel=1e-3)
    for fp8 in (True, False):
        found = deepep_buffer_bytes(V3, 8, 8, fp8_dispatch=fp8)
        assert found % 2**21 == 0
        assert 0 <= found - WORKSPACE - exact < 2**21


def test_a_token_comes_back_at_most_once_from_each_of_its_experts() -> None:
    few = replace(V3, top_k=2)  # fewer than ranks of a node, and than nodes
    combined, rows = 14_336 + 32, 2 * 8 * 4096 + 2 * 4096 + 8 * (4096 + 1280)
    dispatched = 7168 + 896 + 32  # indices, gates, slots and a source: 28 bytes
    sent = 8 * 8 * 4096 + 4096 + 8 * (4096 + 1280)
    assert rows * combined < sent * dispatched
    found = deepep_buffer_bytes(few, 8, 8, fp8_dispatch=True) - WORKSPACE
    assert 0 <= found - sent * dispatched < 2**21


def test_inside_a_node_there_is_no_buffer_to_send_from() -> None:
    dispatched = 14_336 + 0 + 128  # BF16 values; 100 bytes about eight experts
    found = deepep_buffer_bytes(V3, 1, 8, fp8_dispatch=False) - WORKSPACE
    assert 0 <= found - 8 * 4096 * dispatched < 2**21
    assert 0 <= deepep_buffer_bytes(V3, 1, 8, fp8_dispatch=True) - WORKSPACE - 8 * 4096 * COMBINED < 2**21
