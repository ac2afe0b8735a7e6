"""Rotary position embedding of decoupled queries and keys, with YaRN (report §2.1.1 eq. 3-4, §4.3).

Letters: B batch, S sequence, H heads, P rotated pairs (half the rotated head width).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...comm.host_transfer import to_device
from ..precision.fp8_tensors import promote_to_fp32
from .config import ModelConfig, YarnConfig


@dataclass(frozen=True)
class RotaryEmbedding:
    """Rotation exp(i · angle) of every position and pair of dimensions, complex."""

    freqs_cis_SP: Tensor

    def apply(self, x_BSH: Tensor) -> Tensor:
        """Rotate [B, S, H, 2P], whose pairs are neighbors (x0, x1), (x2, x3), …, by a complex product."""
        pairs_BSHP = torch.view_as_complex(promote_to_fp32(x_BSH).unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs_BSHP * self.freqs_cis_SP[:, None]).flatten(-2).to(x_BSH.dtype)


def build_rotary_embedding(config: ModelConfig, length: int, like: Tensor) -> RotaryEmbedding:
    """Build the rotation of positions 0 … length-1, on the device of `like`, in its dtype or FP32 if that is wider."""
    # Angles are FP64: at position 100,000 an FP32 angle is off by up to 0.004 rad.
    frequency_P = _frequencies(config)
    angle_SP = torch.arange(length, dtype=torch.float64)[:, None] * frequency_P
    yarn = config.rope_scaling
    scale = 1.0 if yarn is None else _magnitude(yarn, yarn.mscale) / _magnitude(yarn, yarn.mscale_all_dim)
    turn_SP = torch.polar(torch.full_like(angle_SP, scale), angle_SP)
    dtype = torch.promote_types(like.dtype, torch.float32)
    return RotaryEmbedding(to_device(turn_SP.to(dtype.to_complex()), like.device))


def softmax_scale(config: ModelConfig) -> float:
    """Return 1 / sqrt(head width), times the square of YaRN's temperature √t = 0.1 ln s + 1."""
    scale: float = config.qk_head_dim**-0.5
    if config.rope_scaling is not None:
        scale *= _magnitude(config.rope_scaling, config.rope_scaling.mscale_all_dim) ** 2
    return scale


def _magnitude(yarn: YarnConfig, mscale: float) -> float:
    return 0.1 * mscale * math.log(yarn.factor) + 1.0


def _frequencies(config: ModelConfig) -> Tensor:
    """Return radians per token of each pair. YaRN divides those of slow pairs by its factor, and blends in between."""
    width = config.qk_rope_head_dim
    frequency_P = config.rope_theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    yarn = config.rope_scaling
    if yarn is None:
        return frequency_P

    def dimension_turning(turns: float) -> float:
        """Return the (fractional) pair that makes this many turns over the original length."""
        wavelength = yarn.original_max_position_embeddings / (turns * 2 * math.pi)
        return width * math.log(wavelength) / (2 * math.log(config.rope_theta))

    low = max(math.floor(dimension_turning(yarn.beta_fast)), 0)
    high = min(math.ceil(dimension_turning(yarn.beta_slow)), width - 1)
    interpolated_P = ((torch.arange(width // 2, dtype=torch.float64) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return frequency_P * (1 - interpolated_P) + frequency_P / yarn.factor * interpolated_P
