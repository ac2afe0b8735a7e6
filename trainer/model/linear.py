"""The one Linear through which every projection of the model goes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...parallelism.weight_grad import linear
from ..precision.attention_output import SharedAttentionOutput
from ..precision.fp8 import Fp8LinearOps
from ..precision.swiglu import swiglu
from .recompute import RecomputeModule, run_recomputable


class Linear(nn.Module):
    """y = x Wᵀ, without bias, computed in the dtype of x, or in FP8 where `use_fp8` has set it.

    The weight is cast at its use where its dtype is another.
    """

    def __init__(self, in_features: int, out_features: int, *, after_attention: bool = False) -> None:
        """`after_attention`: FP8 keeps more bits of such an input."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.after_attention = after_attention
        self.fp8: Fp8LinearOps | None = None

    def forward(self, x: Tensor, attention_output: SharedAttentionOutput | None = None) -> Tensor:
        """[..., in_features] to [..., out_features]. `shared`: the attention whose output `x` is; of use in FP8."""
        if self.fp8 is not None:
            return self.fp8.linear(
                x, self.weight, after_attention=self.after_attention, attention_output=attention_output
            )
        return linear(x, self.weight)

    def forward_swiglu(self, gate_up: Tensor) -> Tensor:
        """SwiGLU(gate_up) Wᵀ. FP8 keeps `gate_up` and computes the SwiGLU again in the backward."""
        if self.fp8 is not None:
            return self.fp8.swiglu_linear(gate_up, self.weight)
        return linear(run_recomputable(RecomputeModule.SWIGLU, swiglu, gate_up), self.weight)
