"""Grouped expert GEMMs against their reference, one expert at a time."""

import pytest
import torch

from shoestring.trainer.model.experts import GroupedExperts, grouped_mm, grouped_mm_reference


@pytest.mark.parametrize("rows", [(3, 0, 5, 1), (0, 0, 0, 0), (9, 0, 0, 0)], ids=str)
def test_grouped_products_and_gradients_equal_the_reference(rows: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x_RK = torch.randn(sum(rows), 8, generator=generator, requires_grad=True)
    weight_LNK = torch.randn(4, 12, 8, generator=generator, requires_grad=True)
    upstream_RN = torch.randn(sum(rows), 12, generator=generator)
    grads = []
    for product in (grouped_mm, grouped_mm_reference):
        out_RN = product(x_RK, weight_LNK, rows)
        grads.append((out_RN, *torch.autograd.grad(out_RN, (x_RK, weight_LNK), upstream_RN)))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_experts_without_a_row_get_a_zero_gradient() -> None:
    experts = GroupedExperts(2, hidden=8, inner=16)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_()
    rows_RD, weights_R = torch.randn(3, 8, requires_grad=True), torch.rand(3, requires_grad=True)
    experts(rows_RD, weights_R, (3, 0)).square().sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad is not None
        assert torch.count_nonzero(parameter.grad[1]) == 0
        assert torch.count_nonzero(parameter.grad[0]) > 0


def test_gate_weights_scale_each_row() -> None:
    experts = GroupedExperts(2, hidden=8, inner=16).double()
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_()
    rows_RD = torch.randn(4, 8, dtype=torch.float64)
    weights_R = torch.tensor([0.5, 2.0, 0.0, 1.0], dtype=torch.float64)
    unit = experts(rows_RD, torch.ones(4, dtype=torch.float64), (1, 3))
    torch.testing.assert_close(experts(rows_RD, weights_R, (1, 3)), unit * weights_R[:, None])
