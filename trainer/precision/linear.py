"""The one Linear through which every projection of the model goes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...parallelism.pipeline.weight_grad import linear


class Linear(nn.Module):
    """y = x Wᵀ, without bias, computed in the dtype of x.

    The weight is cast at its use where its dtype is another.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        return linear(x, self.weight)


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in FP32, or as it is where it is wider, so that FP64 runs stay FP64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
