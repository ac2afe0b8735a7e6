"""Linear layer of all projections of the model."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ...parallelism.weight_grad import linear
from ..costs.operation_memory import MicroBatchShape, SavedActivation
from ..precision.attention_output import SharedAttentionOutput
from ..precision.fp8 import Fp8LinearOps
from ..precision.fp8_tensors import columnwise_fp8_bytes, rowwise_fp8_bytes
from ..precision.reference import gemm_workspace_bytes, wgrad_workspace_bytes
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


def linear_input(name: str, rows: float, width: int, batch: MicroBatchShape) -> SavedActivation:
    """Return what a Linear saves of its input, the output of a norm."""
    size = rowwise_fp8_bytes(rows, width) if batch.fp8 else rows * width * batch.element_bytes
    return SavedActivation(name, size, RecomputeModule.NORM, needed_for_wgrad=True)


def output_gradient_bytes(rows: float, widths: Iterable[int], batch: MicroBatchShape, experts: int = 1) -> float:
    """Return the bytes of output gradients that delayed weight gradients of Linears with `widths` outputs hold."""
    if batch.fp8:
        return sum(columnwise_fp8_bytes(rows, width, experts) for width in widths)
    return rows * sum(widths) * batch.element_bytes


def wgrad_bytes(rows: float, inputs: int, outputs: int, batch: MicroBatchShape, experts: int = 1) -> float:
    """Return the bytes of a weight's gradient before it is accumulated, or of those of `experts` experts together."""
    elements = experts * inputs * outputs
    if not batch.fp8:
        return elements * batch.gradient_copy_bytes
    # The `triton` backend accumulates within its GEMM and needs none. The others compute one expert at a time and then
    # stack the results: two copies.
    emulation = wgrad_workspace_bytes(rows / experts, inputs, outputs) if batch.on_cpu else 0.0
    return elements * 2 * batch.fp32_element_bytes + emulation


def gemm_bytes(rows: float, inputs: int, outputs: int, batch: MicroBatchShape, experts: int = 1) -> float:
    """Return the workspace of one product of a Linear: 0 but for FP8 on a CPU."""
    return gemm_workspace_bytes(rows, inputs, outputs, batch.element_bytes, experts) if batch.emulates_fp8 else 0.0
