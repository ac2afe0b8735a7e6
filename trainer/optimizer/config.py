"""AdamW's hyperparameters, and the learning rate as a function of consumed tokens."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from typing_extensions import override

from ...comm.errors import Problem
from ...comm.files.ranges import CheckedConfig, above, at_least, fraction, one_of

_MOMENTS = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
# BF16's spacing is up to 2^-7 of a number: a moving average that changes by less than half of that per step is rounded
# back to where it was.
_LARGEST_BETA2_IN_BF16 = 1 - 2**-8
"""Largest beta2 with which a second moment in BF16 still moves."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(CheckedConfig):
    """AdamW and learning-rate schedule. Defaults are those of report §4.2, except for the schedule's lengths."""

    peak_learning_rate: float = above(0, 2.2e-4)
    """Learning rate at the end of the warm-up."""
    final_learning_rate: float = at_least(0, 2.2e-5)
    """Learning rate from the end of the decay on; at most `peak_learning_rate`."""
    warmup_tokens: int = at_least(0, 0)
    """Tokens over which the rate grows linearly from 0 to the peak."""
    constant_tokens: int | None = at_least(0, None)
    """Tokens after the warm-up at the peak rate; null: the rest of the run."""
    decay_tokens: int = at_least(0, 0)
    """Tokens after that over which the rate falls from peak to final along a cosine; 0: it falls in one step."""
    beta1: float = fraction(0.9)
    """Decay of the first moment."""
    beta2: float = fraction(0.95)
    """Decay of the second moment."""
    eps: float = above(0, 1e-8)
    """Term that keeps Adam's denominator from 0. The report gives no value; this is the usual one."""
    weight_decay: float = at_least(0, 0.1)
    """Decoupled weight decay of weight matrices; norms have none."""
    clip_norm: float = above(0, 1.0)
    """Largest global gradient norm; longer gradients are scaled down to it."""
    moments: str = one_of(("auto", *_MOMENTS), "auto")
    """Dtype of both moments: `bfloat16` (report §3.3.2), `float32`, `float64`, or `auto`: BF16, and FP64 in a run that
    computes in FP64. Updates are computed in the dtype of the master weights."""
    ema_decay: float | None = fraction(None, zero=False)
    """Share of the weights' moving average that a step keeps (report §3.2.3, which gives no value);
    null: no average. Evaluations report the average's loss in addition to that of the weights."""

    @override
    def rule_problems(self) -> Iterator[Problem]:
        if self.moments in ("auto", "bfloat16") and _LARGEST_BETA2_IN_BF16 < self.beta2 < 1:
            hint = (
                f"must be at most {_LARGEST_BETA2_IN_BF16} with BF16 moments, which do not move above it; "
                "or set optimizer.moments=float32"
            )
            yield Problem("beta2", self.beta2, hint, ("moments",))
        if self.final_learning_rate > self.peak_learning_rate:
            hint = f"must be at most peak_learning_rate = {self.peak_learning_rate}"
            yield Problem("final_learning_rate", self.final_learning_rate, hint, ("peak_learning_rate",))
        if self.constant_tokens is None and self.decay_tokens:
            hint = "has no effect while constant_tokens is null (constant for the rest of the run); set constant_tokens"
            yield Problem("decay_tokens", self.decay_tokens, hint, ("constant_tokens",))

    def moments_dtype(self, masters: torch.dtype) -> torch.dtype:
        """Return the dtype of the moments of master weights of dtype `masters`."""
        if self.moments == "auto":
            return torch.float64 if masters == torch.float64 else torch.bfloat16
        return _MOMENTS[self.moments]

    def learning_rate_at(self, tokens: int) -> float:
        """Return the learning rate of the step at whose end `tokens` are consumed (report §4.2)."""
        # The count at the step's end, not at its start: with a warm-up the first step's rate would else be 0.
        peak, final = self.peak_learning_rate, self.final_learning_rate
        if tokens < self.warmup_tokens:
            return peak * tokens / self.warmup_tokens
        tokens -= self.warmup_tokens
        if self.constant_tokens is None or tokens < self.constant_tokens:
            return peak
        tokens -= self.constant_tokens
        if tokens < self.decay_tokens:
            return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * tokens / self.decay_tokens))
        return final
