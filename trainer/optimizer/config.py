"""AdamW's constants and the learning rate as a function of consumed tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ...comm.errors import Problem

_MOMENTS = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
_LARGEST_BETA2_IN_BF16 = 1 - 2**-8
"""BF16's spacing is up to 2^-7 of a number: a mean that one step moves by less than half of that stands still."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Defaults are the report's (§4.2), but for the lengths, which belong to a run."""

    peak_learning_rate: float = 2.2e-4
    """Reached at the end of the warm-up."""
    final_learning_rate: float = 2.2e-5
    """Reached at the end of the decay and kept."""
    warmup_tokens: int = 0
    """Linear from 0 to the peak over these tokens."""
    constant_tokens: int | None = None
    """At the peak for these tokens after the warm-up; null for the rest of the run."""
    decay_tokens: int = 0
    """Cosine from peak to final over these tokens after that; 0 for a step down."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """The report gives none; this is the usual one."""
    weight_decay: float = 0.1
    """Decoupled, on matrices; not on norms."""
    clip_norm: float = 1.0
    """Largest global gradient norm."""
    moments: str = "auto"
    """What both moments are kept in: `bfloat16` (report §3.3.2), `float32`, `float64`, or `auto`: BF16, and FP64 in a
    run that computes in FP64. The arithmetic is that of the master weights."""
    ema_decay: float | None = None
    """What a step keeps of the moving average of the weights (report §3.2.3, which gives no number); null: no average.
    It is evaluated beside the weights."""

    def problems(self) -> Iterator[Problem]:
        """What is impossible about these values on their own."""
        values = self.__dict__
        for name in ("peak_learning_rate", "eps", "clip_norm"):
            if not values[name] > 0:
                yield Problem(name, values[name], "must be greater than 0")
        for name in ("final_learning_rate", "warmup_tokens", "constant_tokens", "decay_tokens", "weight_decay"):
            if values[name] is not None and values[name] < 0:
                yield Problem(name, values[name], "must be at least 0")
        for name in ("beta1", "beta2"):
            if not 0 <= values[name] < 1:
                yield Problem(name, values[name], "must be at least 0 and less than 1")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            yield Problem("ema_decay", self.ema_decay, "must be more than 0 and less than 1, or null")
        if self.moments != "auto" and self.moments not in _MOMENTS:
            yield Problem("moments", self.moments, f"must be auto, {', '.join(_MOMENTS)}")
        if self.moments in ("auto", "bfloat16") and _LARGEST_BETA2_IN_BF16 < self.beta2 < 1:
            hint = (
                f"is above {_LARGEST_BETA2_IN_BF16}, where a BF16 mean stands still; or write optimizer.moments=float32"
            )
            yield Problem("beta2", self.beta2, hint, ("moments",))
        if self.final_learning_rate > self.peak_learning_rate:
            hint = f"must be at most peak_learning_rate = {self.peak_learning_rate}"
            yield Problem("final_learning_rate", self.final_learning_rate, hint, ("peak_learning_rate",))
        if self.constant_tokens is None and self.decay_tokens:
            hint = "is never reached: constant_tokens is null, the rest of the run; say how long the rate is constant"
            yield Problem("decay_tokens", self.decay_tokens, hint, ("constant_tokens",))

    def moments_dtype(self, masters: torch.dtype) -> torch.dtype:
        """The dtype of the moments beside master weights of this one."""
        if self.moments == "auto":
            return torch.float64 if masters == torch.float64 else torch.bfloat16
        return _MOMENTS[self.moments]

    def learning_rate_at(self, tokens: int) -> float:
        """The rate of a step at whose end `tokens` are consumed, so that the first step's is not 0 (report §4.2)."""
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
