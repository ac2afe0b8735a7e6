"""Routing rule by rule: selection, gates, loads, the balance loss of padding, and the bias update in whole numbers.

Letters: B batch, S sequence, T tokens (B·S), D hidden, E experts, K top-k, G groups.
"""

import pytest
import torch
from torch import Tensor

from shoestring.trainer.model.config import ModelConfig
from shoestring.trainer.model.router import Router, RouterOutput, update_router_bias

HIDDEN, EXPERTS, TOP_K, GROUPS, TOP_K_GROUPS = 6, 12, 3, 4, 2
CONFIG = ModelConfig(
    hidden_size=HIDDEN, n_routed_experts=EXPERTS, num_experts_per_tok=TOP_K, n_group=GROUPS, topk_group=TOP_K_GROUPS
)


def make_router(config: ModelConfig = CONFIG, dtype: torch.dtype = torch.float64) -> Router:
    router = Router(config)
    generator = torch.Generator().manual_seed(1)
    drawn_ED = torch.randn(config.n_routed_experts, config.hidden_size, dtype=torch.float64, generator=generator)
    router.weight.data = drawn_ED.to(dtype)
    return router


def inputs(sequences: int = 4, length: int = 10) -> tuple[Tensor, Tensor]:
    x_BSD = torch.randn(sequences, length, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return x_BSD, torch.ones(sequences, length, dtype=torch.bool)


@pytest.mark.parametrize("size", [2**24, 2**31, 2**53], ids=["2^24", "2^31", "2^53"])
def test_the_bias_moves_by_the_exact_sign(size: int) -> None:
    # One token more or less than the mean: FP32 cannot tell it from 2^24 on, FP64 from 2^53 on.
    bias_E = torch.tensor([0.5, 0.5, 0.5, 0.5])
    update_router_bias(bias_E, torch.tensor([size + 1, size, size - 1, size]), update_rate=0.25)
    assert bias_E.tolist() == [0.25, 0.5, 0.75, 0.5]


def test_the_bias_is_updated_in_place_in_fp32() -> None:
    router = make_router()
    bias_E = router.bias_E
    for _ in range(3):
        update_router_bias(router.bias_E, torch.tensor([5] + [1] * (EXPERTS - 1)), update_rate=0.001)
    assert router.bias_E is bias_E
    assert bias_E.dtype == torch.float32
    torch.testing.assert_close(bias_E, torch.tensor([-0.003] + [0.003] * (EXPERTS - 1)))


def test_a_balanced_load_or_none_leaves_the_bias() -> None:
    bias_E = torch.tensor([0.1, -0.2, 0.3])
    for counts_E in (torch.tensor([7, 7, 7]), torch.tensor([0, 0, 0])):
        update_router_bias(bias_E, counts_E, update_rate=0.1)
    assert torch.equal(bias_E, torch.tensor([0.1, -0.2, 0.3]))


def test_padding_is_routed_but_not_counted() -> None:
    router, (x_BSD, valid_BS) = make_router(), inputs()
    valid_BS[0, 7:] = False
    valid_BS[2] = False
    routing = router(x_BSD, valid_BS)
    everyone = router(x_BSD, torch.ones_like(valid_BS))
    assert torch.equal(routing.expert_ids_TK, everyone.expert_ids_TK)
    assert torch.equal(routing.gates_TK, everyone.gates_TK)
    counted = routing.expert_ids_TK[valid_BS.flatten()].flatten()
    assert torch.equal(routing.tokens_per_expert_E, torch.bincount(counted, minlength=EXPERTS))
    assert routing.tokens_per_expert_E.dtype == torch.int64
    assert routing.tokens_per_expert_E.sum() == TOP_K * valid_BS.sum()


def test_a_token_stays_within_its_best_groups() -> None:
    router, (x_BSD, valid_BS) = make_router(), inputs(sequences=8)
    router.bias_E.copy_(torch.linspace(-0.2, 0.2, EXPERTS))
    routing = router(x_BSD, valid_BS)
    score_TE = torch.sigmoid(x_BSD.flatten(0, 1) @ router.weight.detach().T) + router.bias_E
    size = EXPERTS // GROUPS
    unlike = 0
    for score_E, experts_K in zip(score_TE.tolist(), routing.expert_ids_TK.tolist(), strict=True):
        by_group = [score_E[group * size : (group + 1) * size] for group in range(GROUPS)]
        best_two = [sum(sorted(scores)[-2:]) for scores in by_group]
        allowed = sorted(range(GROUPS), key=lambda group: best_two[group])[-TOP_K_GROUPS:]
        reachable = [expert for expert in range(EXPERTS) if expert // size in allowed]
        best = sorted(reachable, key=lambda expert: score_E[expert])[-TOP_K:]
        assert sorted(experts_K) == sorted(best)
        unlike += sorted(best) != sorted(sorted(range(EXPERTS), key=lambda expert: score_E[expert])[-TOP_K:])
    assert unlike > 0  # else the limit limits nothing here


def gates_by_hand(router: Router, x_BSD: Tensor, routing: RouterOutput) -> Tensor:
    chosen_TK = torch.sigmoid(x_BSD.flatten(0, 1) @ router.weight.T).gather(1, routing.expert_ids_TK)
    return router.config.routed_scaling_factor * chosen_TK / chosen_TK.sum(dim=1, keepdim=True)


def test_the_bias_changes_the_selection_but_not_the_gates() -> None:
    router, (x_BSD, valid_BS) = make_router(), inputs()
    without = router(x_BSD, valid_BS)
    router.bias_E[4] = 100.0
    biased = router(x_BSD, valid_BS)
    assert not (without.expert_ids_TK == 4).any(dim=1).all()
    assert (biased.expert_ids_TK == 4).any(dim=1).all()
    for routing in (without, biased):
        torch.testing.assert_close(routing.gates_TK, gates_by_hand(router, x_BSD, routing), rtol=1e-14, atol=0)
        torch.testing.assert_close(routing.gates_TK.sum(dim=1), torch.full((x_BSD[..., 0].numel(),), 2.5).double())

    router.bias_E.fill_(100.0)  # of all experts alike: no other selection either
    assert torch.equal(router(x_BSD, valid_BS).expert_ids_TK.sort().values, without.expert_ids_TK.sort().values)


def test_no_gradient_reaches_the_bias() -> None:
    router, (x_BSD, valid_BS) = make_router(), inputs()
    routing = router(x_BSD, valid_BS)
    (routing.gates_TK[:, 0].sum() + routing.balance_loss).backward()
    assert router.weight.grad is not None
    assert dict(router.named_parameters()).keys() == {"weight"}
    assert not router.bias_E.requires_grad


def test_gates_are_fp32_in_a_bf16_run() -> None:
    router, (x_BSD, valid_BS) = make_router(dtype=torch.float32), inputs()
    routing = router(x_BSD.bfloat16(), valid_BS)
    assert routing.gates_TK.dtype == routing.balance_loss.dtype == torch.float32


def test_the_balance_loss_is_1_a_sequence_at_equal_affinities() -> None:
    router, (x_BSD, valid_BS) = make_router(), inputs(sequences=3)
    router.weight.data.zero_()
    valid_BS[1, 2:] = False
    assert router(x_BSD, valid_BS).balance_loss.item() == pytest.approx(3.0, rel=1e-14)


def test_a_sequence_without_valid_tokens_adds_nothing_to_the_balance_loss() -> None:
    router, (x_BSD, valid_BS) = make_router(), inputs(sequences=2)
    alone = router(x_BSD[:1], valid_BS[:1]).balance_loss
    alone.backward()
    assert router.weight.grad is not None
    expected = router.weight.grad.clone()

    router.weight.grad = None
    valid_BS[1] = False
    both = router(x_BSD, valid_BS).balance_loss
    both.backward()
    assert both.item() == pytest.approx(alone.item(), rel=1e-14)
    torch.testing.assert_close(router.weight.grad, expected)


def test_padding_alone_has_no_balance_loss_and_a_finite_gradient() -> None:
    router, (x_BSD, valid_BS) = make_router(), inputs()
    routing = router(x_BSD, torch.zeros_like(valid_BS))
    routing.balance_loss.backward()
    assert routing.balance_loss.item() == 0.0
    assert router.weight.grad is not None
    assert not router.weight.grad.any()  # NaN would count as any
    assert not routing.tokens_per_expert_E.any()
