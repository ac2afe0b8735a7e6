"""Linear layer of all projections of the model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...parallelism.weight_grad import linear
from ..precision.attention_output import SharedAttentionOutput
from ..precision.fp8 import Fp8LinearOps
from ..precision.swiglu import swiglu
from .recompute import RecomputeModule, run_recomputable


class Linear(nn.Module):
    """Linear layer y = x Wᵀ without bias, computed in the dtype of x, or in FP8 after `Model.enable_fp8`.

    A weight of another dtype is cast when it is used.
    """

    def __init__(self, in_features: int, out_features: int, *, after_attention: bool = False) -> None:
        """Create the weight, uninitialized; `after_attention`: in FP8 the input is saved in E5M6 (report §3.3.3)."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.after_attention = after_attention
        self.fp8: Fp8LinearOps | None = None

    def forward(self, x: Tensor, attention_output: SharedAttentionOutput | None = None) -> Tensor:
        """Compute [..., out_features]. `attention_output`: the attention whose output `x` is, used in FP8."""
        if self.fp8 is not None:
            return self.fp8.linear(
                x, self.weight, after_attention=self.after_attention, attention_output=attention_output
            )
        return linear(x, self.weight)

    def forward_swiglu(self, gate_up: Tensor) -> Tensor:
        """Compute SwiGLU(gate_up) Wᵀ. FP8 saves `gate_up` and recomputes the SwiGLU in the backward."""
        if self.fp8 is not None:
            return self.fp8.swiglu_linear(gate_up, self.weight)
        return linear(run_recomputable(RecomputeModule.SWIGLU, swiglu, gate_up), self.weight)
