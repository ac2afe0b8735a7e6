"""The parts of a model add up to the whole."""

import pytest

from shoestring.trainer.costs.flops import count_flops, count_part_costs
from shoestring.trainer.costs.parameters import count_parameters
from shoestring.trainer.model.config import ModelConfig


@pytest.mark.parametrize("mtp_depth", [0, 1, 2])
def test_parts_add_up(mtp_depth: int) -> None:
    config = ModelConfig(num_hidden_layers=5, first_k_dense_replace=2, num_nextn_predict_layers=mtp_depth)
    parts, count, flops = count_part_costs(config, 64), count_parameters(config), count_flops(config, 64)
    layers = sum(layer.parameters for layer in parts.layers)
    assert parts.embedding.parameters + layers + parts.head.parameters == count.main
    assert parts.mtp.parameters == count.mtp
    assert parts.last_stage_extra.parameters == parts.head.parameters + count.mtp
    assert sum(layer.flops for layer in parts.layers) + parts.head.flops == pytest.approx(flops.main_model, rel=1e-12)
    assert parts.last_stage_extra.flops - parts.head.flops == pytest.approx(flops.mtp, rel=1e-12)
    assert parts.embedding.flops == 0


def test_flops_of_each_part_by_hand() -> None:
    config = ModelConfig(num_hidden_layers=2, first_k_dense_replace=1, num_nextn_predict_layers=1)
    length, hidden, heads = 64, config.hidden_size, config.num_attention_heads
    attention = (
        hidden * 64  # q_lora_rank
        + 64 * heads * config.qk_head_dim
        + hidden * (config.kv_lora_rank + config.qk_rope_head_dim)
        + config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
        + heads * config.v_head_dim * hidden
    )
    core = heads * (config.qk_head_dim + config.v_head_dim) * length / 2
    dense = 3 * hidden * config.intermediate_size
    routed = (
        3 * hidden * config.moe_intermediate_size * (config.num_experts_per_tok + config.n_shared_experts)
        + config.n_routed_experts * hidden
    )
    head = hidden * config.vocab_size
    parts = count_part_costs(config, length)
    assert [layer.flops for layer in parts.layers] == [
        pytest.approx(6 * (attention + core + dense)),
        pytest.approx(6 * (attention + core + routed)),
    ]
    assert parts.head.flops == pytest.approx(6 * head)
    assert parts.mtp.flops == pytest.approx(6 * (2 * hidden**2 + attention + core + routed + head))
