"""The reference against transformers' DeepSeek-V3, and its other parts against formulas and finite differences."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shoestring.tests.reference import deepseek_v3 as reference
from shoestring.tests.reference import hf
from shoestring.tests.reference.configs import random_params, reference_configs
from shoestring.tests.reference.deepseek_v3 import Losses, ReferenceConfig
from shoestring.tests.reference.rotary import Yarn, frequencies, rotate

CONFIGS = reference_configs()
WITH_MTP = [name for name, config in CONFIGS.items() if config.num_nextn_predict_layers]
BATCH, LENGTH = 2, 16
# Measured: logits (of standard deviation 1) differ by up to 3e-6 and gradients by 2e-6 in FP32, both by 5e-15 in FP64.
LOGITS_TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}
GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-12}


def window(config: ReferenceConfig, seed: int = 1, batch: int = BATCH) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, LENGTH + 1 + config.num_nextn_predict_layers), generator=generator)


def leaves(config: ReferenceConfig, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    params = random_params(config, seed, dtype)
    return {name: value.requires_grad_(reference.is_trained(name)) for name, value in params.items()}


def gradients(params: dict[str, Tensor], loss: Tensor) -> dict[str, Tensor]:
    trained = {name: value for name, value in params.items() if reference.is_trained(name)}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def detached(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in params.items()}


def worst_error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the largest relative error of a parameter; it is 0 where both are zero (an expert no token chose)."""
    assert ours.keys() == theirs.keys()
    tiny = 1e-300
    return max(float((ours[name] - theirs[name]).norm() / (theirs[name].norm() + tiny)) for name in ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_main_model_is_that_of_transformers(name: str, dtype: torch.dtype) -> None:
    config = replace(CONFIGS[name], num_nextn_predict_layers=0, balance_alpha=0.0)
    params, tokens_BW = leaves(config, dtype), window(config)
    ours = reference.logits(params, config, tokens_BW[:, :-1])
    loss = reference.losses(params, config, tokens_BW, torch.ones_like(tokens_BW, dtype=torch.bool)).total

    model = hf.to_transformers(config, detached(params))
    with hf.precision_of(dtype):
        theirs = model(tokens_BW[:, :-1]).logits
    their_loss = F.cross_entropy(theirs.flatten(0, 1), tokens_BW[:, 1:].flatten())
    torch.autograd.backward(their_loss)

    assert ours.dtype == dtype
    assert 0.5 < float(ours.detach().std()) < 2
    assert float((ours - theirs).detach().abs().max()) < LOGITS_TOLERANCE[dtype]
    assert float((loss - their_loss).detach().abs()) < LOGITS_TOLERANCE[dtype]
    assert worst_error(gradients(params, loss), hf.gradients_of(model)) < GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", WITH_MTP)
def test_mtp_modules_are_those_of_transformers(name: str, dtype: torch.dtype) -> None:
    config = replace(CONFIGS[name], balance_alpha=0.0)
    params, tokens_BW = leaves(config, dtype), window(config)
    ours = reference.losses(params, config, tokens_BW, torch.ones_like(tokens_BW, dtype=torch.bool))

    main = hf.to_transformers(config, detached(params))
    modules = hf.to_transformers_mtp(config, detached(params), main)
    positions = torch.arange(LENGTH)[None]
    with hf.precision_of(dtype):
        hidden = main.model(tokens_BW[:, :LENGTH]).last_hidden_state
        total = F.cross_entropy(main.lm_head(hidden).flatten(0, 1), tokens_BW[:, 1 : LENGTH + 1].flatten())
        for depth in range(1, config.num_nextn_predict_layers + 1):
            inputs = tokens_BW[:, depth : depth + LENGTH]
            hidden = modules.forward_layer(depth - 1, hidden, positions, None, input_ids=inputs)
            targets = tokens_BW[:, depth + 1 : depth + 1 + LENGTH]
            loss = F.cross_entropy(main.lm_head(hidden).flatten(0, 1), targets.flatten())
            total = total + config.mtp_weight / config.num_nextn_predict_layers * loss
        torch.autograd.backward(total)

    assert float((ours.total - total).detach().abs()) < LOGITS_TOLERANCE[dtype]
    theirs = hf.gradients_of(main) | hf.mtp_gradients_of(config, modules)
    assert worst_error(gradients(params, ours.total), theirs) < GRADIENT_TOLERANCE[dtype]


def total_of(params: dict[str, Tensor], config: ReferenceConfig, tokens_BW: Tensor, valid_BW: Tensor) -> Losses:
    with torch.no_grad():
        return reference.losses(params, config, tokens_BW, valid_BW)


@pytest.mark.parametrize("name", ["full", "raw_gates", "yarn", "two_mtp"])
def test_gradient_of_the_whole_loss_is_its_slope(name: str) -> None:
    """f of the balance loss carries no gradient, but it is constant between changes of the routing, so slopes agree."""
    config = CONFIGS[name]
    params, tokens_BW = leaves(config, torch.float64), window(config)
    valid_BW = torch.ones_like(tokens_BW, dtype=torch.bool)
    valid_BW[1, 11:] = False
    loss = reference.losses(params, config, tokens_BW, valid_BW)
    assert float(loss.balance.detach()) > 0
    generator = torch.Generator().manual_seed(3)
    slope, direction = 0.0, {}
    for parameter, gradient in gradients(params, loss.total).items():
        direction[parameter] = torch.randn(gradient.shape, dtype=torch.float64, generator=generator)
        slope += float((direction[parameter] * gradient).sum())

    step = 1e-6
    start = detached(params)
    sides = []
    for signed in (step, -step):
        moved = start | {parameter: start[parameter] + signed * by for parameter, by in direction.items()}
        side = total_of(moved, config, tokens_BW, valid_BW)
        assert all(torch.equal(side.counts[layer], loss.counts[layer]) for layer in loss.counts), "the routing changed"
        sides.append(float(side.total))
    assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(slope, rel=1e-6)


def test_balance_loss_is_the_formula_token_by_token() -> None:
    config = replace(CONFIGS["one_group"], num_hidden_layers=1, num_nextn_predict_layers=0)
    params, tokens_BW = detached(leaves(config, torch.float64)), window(config)
    valid_BW = torch.ones_like(tokens_BW, dtype=torch.bool)
    valid_BW[0, 5:] = False
    _, routings = reference.main_model(params, config, tokens_BW[:, :LENGTH])
    expected = 0.0
    for sequence, valid in enumerate((5, LENGTH)):
        for expert in range(config.n_routed_experts):
            chosen, share = 0, 0.0
            for token in range(valid):
                scores_E = routings[0].scores[sequence, token]
                biased_E = scores_E + params["model.layers.0.mlp.gate.e_score_correction_bias"]
                chosen += int(expert in biased_E.topk(config.num_experts_per_tok).indices.tolist())
                share += float(scores_E[expert] / scores_E.sum())
            f = config.n_routed_experts / (config.num_experts_per_tok * valid) * chosen
            expected += config.balance_alpha * f * share / valid / BATCH
    assert float(total_of(params, config, tokens_BW, valid_BW).balance) == pytest.approx(expected, rel=1e-12)


def test_targets_count_where_they_and_their_input_are_valid() -> None:
    config = CONFIGS["two_mtp"]
    params, tokens_BW = detached(leaves(config, torch.float64)), window(config)
    valid_BW = torch.rand(tokens_BW.shape, generator=torch.Generator().manual_seed(5)) < 0.7
    hidden_BSD, _ = reference.main_model(params, config, tokens_BW[:, :LENGTH])
    head = params["lm_head.weight"]
    sums = []
    for depth in range(config.num_nextn_predict_layers + 1):
        if depth:
            inputs = tokens_BW[:, depth : depth + LENGTH]
            hidden_BSD, _ = reference.mtp_module(params, depth, config, hidden_BSD, inputs)
        log_probabilities = (hidden_BSD @ head.T).log_softmax(-1)
        sums.append(0.0)
        for sequence in range(BATCH):
            for at in range(LENGTH):
                if valid_BW[sequence, at] and valid_BW[sequence, at + depth + 1]:
                    sums[depth] -= float(log_probabilities[sequence, at, tokens_BW[sequence, at + depth + 1]])
    targets = int((valid_BW[:, :LENGTH] & valid_BW[:, 1 : LENGTH + 1]).sum())
    loss = total_of(params, config, tokens_BW, valid_BW)
    assert float(loss.main) == pytest.approx(sums[0] / targets, rel=1e-12)
    assert float(loss.mtp) == pytest.approx(config.mtp_weight / 2 * (sums[1] + sums[2]) / targets, rel=1e-12)
    assert float(loss.total) == pytest.approx(float(loss.main + loss.mtp + loss.balance), rel=1e-15)


def test_micro_batches_add_up_to_the_batch() -> None:
    config = CONFIGS["two_mtp"]
    params, tokens_BW = detached(leaves(config, torch.float64)), window(config, batch=4)
    valid_BW = torch.ones_like(tokens_BW, dtype=torch.bool)
    valid_BW[1, 6:] = False
    valid_BW[3] = False
    whole = total_of(params, config, tokens_BW, valid_BW)
    targets = 2 * LENGTH + 5
    parts = [
        reference.losses(params, config, tokens_BW[at : at + 1], valid_BW[at : at + 1], targets, 4) for at in range(4)
    ]
    assert float(parts[3].total) == 0, "a sequence without valid tokens contributes nothing"
    assert float(sum(part.total for part in parts)) == pytest.approx(float(whole.total), rel=1e-12)
    assert whole.counts.keys() == {1, 2, 3}
    for layer, counts_E in whole.counts.items():
        assert counts_E.dtype == torch.int64
        assert int(counts_E.sum()) == config.num_experts_per_tok * (2 * LENGTH + 6)
        assert torch.equal(sum((part.counts[layer] for part in parts), torch.zeros_like(counts_E)), counts_E)


def test_choice_follows_bias_and_group_limit_but_gates_do_not() -> None:
    config = CONFIGS["full"]
    params = detached(leaves(config, torch.float64))
    params["model.layers.1.mlp.gate.e_score_correction_bias"] = torch.zeros(16)
    params["model.layers.1.mlp.gate.e_score_correction_bias"][5] = 10.0
    x_BSD = torch.randn(1, 50, config.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    routing = reference.route(params, "model.layers.1.mlp", config, x_BSD)
    assert bool(routing.chosen[..., 5].all())
    assert bool((routing.chosen.sum(-1) == config.num_experts_per_tok).all())
    groups_hit = routing.chosen.view(1, 50, 4, 4).any(-1).sum(-1)
    assert int(groups_hit.max()) <= config.topk_group
    torch.testing.assert_close(routing.gates.sum(-1), torch.full((1, 50), 2.5, dtype=torch.float64))
    scores = routing.scores[0, 0] * routing.chosen[0, 0]
    torch.testing.assert_close(routing.gates[0, 0], 2.5 * scores / scores.sum())


def test_logits_do_not_see_later_tokens() -> None:
    config = CONFIGS["full"]
    params, tokens_BW = detached(leaves(config, torch.float64)), window(config)
    changed = tokens_BW.clone()
    changed[:, 9] = (changed[:, 9] + 1) % config.vocab_size
    before, after = (reference.logits(params, config, tokens) for tokens in (tokens_BW, changed))
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=0, atol=1e-12)
    assert float((before[:, 9:] - after[:, 9:]).abs().amax(-1).min()) > 1e-4


def test_rotary_embedding_is_relative_and_keeps_lengths() -> None:
    generator = torch.Generator().manual_seed(9)
    x_BSHY = torch.randn(1, 1, 1, 8, dtype=torch.float64, generator=generator).expand(-1, 20, -1, -1)
    y_BSHY = torch.randn(1, 1, 1, 8, dtype=torch.float64, generator=generator).expand(-1, 20, -1, -1)
    yarn = Yarn(factor=4.0, original_length=8, beta_fast=1.2, beta_slow=0.1)
    for stretching in (None, yarn):
        x, y = rotate(x_BSHY, 100.0, stretching)[0, :, 0], rotate(y_BSHY, 100.0, stretching)[0, :, 0]
        torch.testing.assert_close(x.norm(dim=-1), x_BSHY[0, :, 0].norm(dim=-1))
        torch.testing.assert_close((x[3:] * y[:-3]).sum(-1), (x[3] * y[0]).sum().expand(17))


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones() -> None:
    """The report's long-context settings: factor 40 over 4096 tokens, 64 rotary dimensions."""
    ratio = frequencies(64, 10000.0, Yarn(40.0, 4096)) / frequencies(64, 10000.0, None)
    assert bool((ratio[:11] == 1).all())
    torch.testing.assert_close(ratio[23:], torch.full((9,), 1 / 40, dtype=torch.float64))
    assert bool((ratio.diff() <= 1e-15).all())


def test_bias_moves_towards_the_mean_load_exactly() -> None:
    huge = 2**60
    counts_E = torch.tensor([huge + 1, huge, huge - 1, huge])
    bias_E = torch.zeros(4)
    moved = reference.bias_update(bias_E, counts_E, 0.05)
    torch.testing.assert_close(moved, torch.tensor([-0.05, 0.0, 0.05, 0.0]))
    assert moved.dtype == torch.float32
    assert bool((bias_E == 0).all())
