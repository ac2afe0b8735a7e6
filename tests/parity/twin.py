"""The plain single-process twin: the whole global batch at once, ordinary autograd, one tensor after another.

Its arithmetic is tests/reference alone. It is FP64 whatever the layout computes in, so an FP32 layout shows its own
rounding and nothing else.
"""

from __future__ import annotations

import torch

from shoestring.tests.parity.layouts import (
    ADAM_EPS,
    BIAS_SPEED,
    Layout,
    clip_norm,
    global_batch,
    learning_rate,
    start_params,
)
from shoestring.tests.parity.outcome import Outcome, StepOutcome
from shoestring.tests.reference.adamw import AdamW, Moments, adamw_step
from shoestring.tests.reference.deepseek_v3 import BIAS, bias_update, is_trained, losses


def run_twin(layout: Layout, steps: int) -> Outcome:
    """The first `steps` optimizer steps of the layout's training."""
    params = {
        name: value.double() if is_trained(name) else value  # routing biases are FP32 everywhere
        for name, value in start_params(layout).items()
    }
    moments, records = Moments(), []
    for step in range(steps):
        leaves = {name: value.clone().requires_grad_(is_trained(name)) for name, value in params.items()}
        found = losses(leaves, layout.config, *global_batch(layout, step))
        found.total.backward()
        gradients = {
            name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            for name, leaf in leaves.items()
            if is_trained(name)
        }
        settings = AdamW(learning_rate=learning_rate(step), eps=ADAM_EPS, clip_norm=clip_norm(step))
        norm = adamw_step(params, gradients, moments, settings)
        for layer, counts_E in found.counts.items():
            name = f"model.layers.{layer}.{BIAS}"
            params[name] = bias_update(params[name], counts_E, BIAS_SPEED)
        records.append(
            StepOutcome(
                total=found.total.item(),
                main=found.main.item(),
                mtp=found.mtp.item(),
                balance=found.balance.item(),
                norm=norm,
                gradients=gradients,
                counts_E=found.counts,
            )
        )
    return Outcome(
        tuple(records),
        weights={name: value for name, value in params.items() if is_trained(name)},
        biases={name: value for name, value in params.items() if not is_trained(name)},
    )
