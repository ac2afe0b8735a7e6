"""Initial weights depend on the seed and the name, not on the number of ranks."""

import pytest
import torch

from shoestring.trainer.model.config import ModelConfig
from shoestring.trainer.model.model import Model, ModelShard, initialize_weights

CONFIG = ModelConfig(initializer_range=0.02)  # tiny


def initialized(seed: int, expert_ranks: int = 1, expert_rank: int = 0, config: ModelConfig = CONFIG) -> Model:
    model = Model(config, ModelShard.full_model(config, expert_ranks, expert_rank))
    initialize_weights(model, seed)
    return model


@pytest.mark.parametrize("ranks", [2, 4, 16])
def test_every_share_of_the_experts_is_a_slice_of_the_whole(ranks: int) -> None:
    whole = dict(initialized(seed=3).named_parameters())
    local = CONFIG.n_routed_experts // ranks
    for rank in range(ranks):
        share = initialized(3, ranks, rank)
        experts = share.expert_parameter_names()
        for name, parameter in share.named_parameters():
            expected = whole[name][rank * local : (rank + 1) * local] if name in experts else whole[name]
            assert torch.equal(parameter, expected), name


def test_the_seed_alone_decides() -> None:
    first = dict(initialized(seed=5).named_parameters())
    torch.manual_seed(99)  # the global generator has no effect
    again, other = dict(initialized(seed=5).named_parameters()), dict(initialized(seed=6).named_parameters())
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name]), name
        assert torch.equal(parameter, other[name]) == (parameter.ndim == 1), name


def test_weights_of_one_shape_differ() -> None:
    parameters = dict(initialized(seed=0).named_parameters())
    assert not torch.equal(parameters["layers.1.router.weight"], parameters["layers.2.router.weight"])
    experts = parameters["layers.1.experts.down_LDF"]
    assert not torch.equal(experts[0], experts[1])
    assert not torch.equal(experts[0], parameters["layers.2.experts.down_LDF"][0])


@pytest.mark.parametrize("std", [0.006, 0.02])
def test_weights_are_normal_with_the_configured_spread(std: float) -> None:
    for name, parameter in initialized(0, config=ModelConfig(initializer_range=std)).named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
            continue
        spread, error = parameter.std().item(), parameter.numel() ** -0.5
        assert spread == pytest.approx(std, rel=4 * error), name  # the standard error of a spread is std / sqrt(2 n)
        assert abs(parameter.mean().item()) < 4.5 * std * error, name
        assert (parameter.abs() < 2 * std).double().mean().item() == pytest.approx(0.9545, abs=2 * error), name


def test_routing_biases_start_at_zero() -> None:
    model = Model(CONFIG)
    for _, router in model.routers():
        router.bias_E.fill_(1.0)
    initialize_weights(model, seed=0)
    names = [name for name, router in model.routers() if not router.bias_E.any()]
    assert names == ["layer_01", "layer_02", "layer_03", "mtp_01"]


def test_an_fp64_run_starts_from_the_same_weights() -> None:
    wide = Model(CONFIG).double()
    initialize_weights(wide, seed=3)
    for (name, ours), expected in zip(wide.named_parameters(), initialized(seed=3).parameters(), strict=True):
        assert torch.equal(ours, expected.double()), name
