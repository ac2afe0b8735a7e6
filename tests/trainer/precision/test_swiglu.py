"""The fused SwiGLU against its reference."""

import pytest
import torch

from shoestring.tests.trainer.model.against_reference import gradients, random
from shoestring.trainer.precision.swiglu import swiglu, swiglu_reference


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
def test_swiglu_equals_the_reference_to_the_last_bit(dtype: torch.dtype) -> None:
    gate_up = random(3, 5, 12, dtype=dtype)
    pairs = zip(gradients(swiglu, gate_up), gradients(swiglu_reference, gate_up), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_weighted_swiglu() -> None:
    for rows in (6, 0):
        gate_up_RF, weights_R = random(rows, 10), random(rows)
        pairs = (gradients(f, gate_up_RF, weights_R) for f in (swiglu, swiglu_reference))
        for ours, theirs in zip(*pairs, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
