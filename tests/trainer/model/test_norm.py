"""The fused RMSNorm against its reference."""

import torch

from shoestring.tests.trainer.model.against_reference import gradients, random
from shoestring.trainer.model.norm import rms_norm, rms_norm_reference


def test_rms_norm() -> None:
    x, weight = random(3, 5, 8), random(8)
    for ours, theirs in zip(
        gradients(lambda a, b: rms_norm(a, b, 1e-6), x, weight),
        gradients(lambda a, b: rms_norm_reference(a, b, 1e-6), x, weight),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
