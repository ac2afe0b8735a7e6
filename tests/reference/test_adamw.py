"""The plain AdamW against torch's."""

import pytest
import torch
from torch import Tensor

from shoestring.tests.reference.adamw import AdamW, Moments, adamw_step, global_norm

SHAPES = {"matrix": (7, 5), "experts": (3, 4, 2), "norm": (6,), "bias": (4,)}


def tensors(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(s, dtype=torch.float64, generator=generator) for name, s in SHAPES.items()}


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_steps_are_those_of_torch(clip_norm: float | None) -> None:
    settings = AdamW(learning_rate=0.03, weight_decay=0.2, clip_norm=clip_norm)
    params, moments = tensors(0), Moments()
    theirs = {name: value.clone().requires_grad_() for name, value in params.items()}
    optimizer = torch.optim.AdamW(
        [
            {"params": [value for value in theirs.values() if value.ndim >= 2], "weight_decay": settings.weight_decay},
            {"params": [value for value in theirs.values() if value.ndim < 2], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
    )
    for step in range(5):
        gradients = tensors(step + 1, scale=0.01 if step == 2 else 1.0)
        norm = adamw_step(params, gradients, moments, settings)
        assert norm == pytest.approx(float(torch.cat([g.flatten() for g in gradients.values()]).norm()), rel=1e-12)
        coefficient = min(1.0, clip_norm / norm) if clip_norm is not None else 1.0
        for name, value in theirs.items():
            value.grad = gradients[name] * coefficient
        optimizer.step()
    for name, value in theirs.items():
        torch.testing.assert_close(params[name], value.detach(), rtol=1e-12, atol=1e-14)


def test_a_parameter_without_a_gradient_stays() -> None:
    params, before = tensors(0), tensors(0)
    gradients = {name: gradient for name, gradient in tensors(1).items() if name != "bias"}
    adamw_step(params, gradients, Moments(), AdamW(learning_rate=0.1))
    assert torch.equal(params["bias"], before["bias"])
    assert not torch.equal(params["norm"], before["norm"])


def test_norms_do_not_decay() -> None:
    params, before = tensors(0), tensors(0)
    adamw_step(params, {name: torch.zeros_like(v) for name, v in params.items()}, Moments(), AdamW(learning_rate=0.1))
    assert torch.equal(params["norm"], before["norm"])
    torch.testing.assert_close(params["matrix"], before["matrix"] * (1 - 0.1 * 0.1))


def test_norm_is_summed_in_fp64() -> None:
    assert global_norm({"a": torch.full((10**6,), 1e-4), "b": torch.tensor([1e8])}) == pytest.approx(1e8, rel=1e-15)
    assert global_norm({"a": torch.full((4,), 1e30), "b": torch.zeros(0)}) == pytest.approx(2e30, rel=1e-6)
