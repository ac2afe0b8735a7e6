"""The rotary embedding of DeepSeek-V3 and its YaRN scaling, written plainly: tables are made in FP64 for every dtype.

Shape suffixes: B batch, S sequence, H heads, Y rotary width of a head.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071; report §4.3): a context of `original_length` tokens, stretched `factor` times."""

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


def magnitude(factor: float, mscale: float) -> float:
    """Return YaRN's correction of magnitudes for a context stretched by `factor`: 0.1 mscale ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_factor(yarn: Yarn | None) -> float:
    """Return the factor on attention logits in addition to 1 / sqrt(width)."""
    return 1.0 if yarn is None else magnitude(yarn.factor, yarn.mscale_all_dim) ** 2


def frequencies(width: int, theta: float, yarn: Yarn | None) -> Tensor:
    """Return radians per token of each rotary pair, FP64 [width / 2]."""
    pair = torch.arange(width // 2, dtype=torch.float64)
    frequency = theta ** (-2.0 * pair / width)
    if yarn is None:
        return frequency

    def pair_that_turns(times: float) -> float:
        """Return the (fractional) index of the pair that turns `times` times within the original length."""
        return width * math.log(yarn.original_length / (times * 2 * math.pi)) / (2 * math.log(theta))

    # Fast pairs keep their frequency, slow ones are stretched by `factor`, those between are mixed linearly.
    first = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(yarn.beta_slow)), width - 1)
    stretched = ((pair - first) / max(last - first, 0.001)).clamp(0, 1)
    return frequency * (1 - stretched) + frequency / yarn.factor * stretched


def rotate(x_BSHY: Tensor, theta: float, yarn: Yarn | None) -> Tensor:
    """Rotate each pair (2j, 2j+1) of the last dimension by position times frequency: weights hold interleaved pairs."""
    positions_S = torch.arange(x_BSHY.shape[1], dtype=torch.float64)
    angle = torch.outer(positions_S, frequencies(x_BSHY.shape[-1], theta, yarn))[:, None, :].to(x_BSHY.device)
    gain = 1.0
    if yarn is not None:
        gain = magnitude(yarn.factor, yarn.mscale) / magnitude(yarn.factor, yarn.mscale_all_dim)
    wide = x_BSHY.to(torch.promote_types(x_BSHY.dtype, torch.float32))
    cos, sin = (gain * angle.cos()).to(wide.dtype), (gain * angle.sin()).to(wide.dtype)
    even, odd = wide[..., 0::2], wide[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x_BSHY.dtype)
