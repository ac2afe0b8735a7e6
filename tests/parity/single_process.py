"""The plain single-process reference: the whole global batch at once, ordinary autograd, one tensor after another.

Its arithmetic is tests/reference alone. It is FP64 whatever the layout computes in, so an FP32 layout shows its own
rounding and nothing else. In FP8 a tile of a weight's gradient holds rows of one micro-batch, and those of one rank
unless an expert received them; so there the reference takes one by one what an expert-parallel group takes together.
"""

from functools import reduce

import torch
from torch import Tensor

from shoestring.tests.parity.layouts import (
    ADAM_EPS,
    BIAS_SPEED,
    SEQUENCE_LENGTH,
    Layout,
    clip_norm,
    global_batch,
    learning_rate,
    start_params,
)
from shoestring.tests.parity.outcome import Outcome, StepOutcome
from shoestring.tests.reference.adamw import AdamW, Moments, adamw_step
from shoestring.tests.reference.deepseek_v3 import BIAS, Losses, bias_update, is_trained, losses
from shoestring.tests.reference.fp8_model import in_fp8


def run_single_process(layout: Layout, steps: int) -> Outcome:
    """The first `steps` optimizer steps of the layout's training."""
    params = {
        name: value.double() if is_trained(name) else value  # routing biases are FP32 everywhere
        for name, value in start_params(layout).items()
    }
    moments, records = Moments(), []
    for step in range(steps):
        leaves = {name: value.clone().requires_grad_(is_trained(name)) for name, value in params.items()}
        found = (
            _losses_fp8(leaves, layout, step)
            if layout.fp8
            else losses(leaves, layout.config, *global_batch(layout, step))
        )
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


def _losses_fp8(leaves: dict[str, Tensor], layout: Layout, step: int) -> Losses:
    tokens_BW, valid_BW = global_batch(layout, step)
    length = SEQUENCE_LENGTH
    targets = int((valid_BW[:, :length] & valid_BW[:, 1 : length + 1]).sum())
    together = layout.ep * layout.sequences_per_micro_batch
    with in_fp8(leaves, tokens_apart=layout.sequences_per_micro_batch * length):
        parts = [
            losses(leaves, layout.config, tokens, valid, targets, layout.sequences_of(step))
            for tokens, valid in zip(tokens_BW.split(together), valid_BW.split(together), strict=True)
        ]
    return reduce(_plus, parts)


def _plus(one: Losses, other: Losses) -> Losses:
    return Losses(
        total=one.total + other.total,
        main=one.main + other.main,
        mtp=one.mtp + other.mtp,
        balance=one.balance + other.balance,
        counts={layer: counts_E + other.counts[layer] for layer, counts_E in one.counts.items()},
    )
