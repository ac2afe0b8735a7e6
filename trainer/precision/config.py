"""Number formats of compute, weights and FP8 operands."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from typing_extensions import override

from ...comm.errors import Problem
from ...comm.files.ranges import CheckedConfig, one_of
from .backend import BACKEND_NAMES, open_backend
from .fp8 import Fp8LinearOps
from .fp8_tensors import ScaleFormat

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig(CheckedConfig):
    """Dtypes of a run. Master weights and gradients are FP32, or FP64 when `compute` is.

    Weights are stored in `compute`, except those of norms and routers: see `trainer.run.bucket_plan.build_buckets`.
    """

    compute: str = one_of(("auto", *_DTYPES), "auto")
    """Dtype of activations and weights: `float32`, `bfloat16`, `float64`, or `auto`: BF16 on a GPU, FP32 elsewhere."""
    linear: str = one_of(("native", "fp8"), "native")
    """Number format of all Linears except the head: `native` (that of `compute`), or `fp8` as in report §3.3."""
    fp8_backend: str = one_of(("auto", *BACKEND_NAMES), "auto")
    """FP8 implementation: `triton`, `torch`, `te`, `reference`, or `auto`, the fastest that the device supports (see
    `shoestring doctor`)."""
    fp8_scale_format: str = one_of(ScaleFormat, "fp32")
    """Format of FP8 scales. Scales that are powers of two in the report always are."""

    @override
    def rule_problems(self) -> Iterator[Problem]:
        for name, default in (("fp8_backend", "auto"), ("fp8_scale_format", "fp32")):
            if self.linear == "native" and (value := self.__dict__[name]) != default:
                yield Problem(name, value, "is used in FP8 only: set precision.linear=fp8, or remove it", ("linear",))

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        """Return the dtype of activations on `device`."""
        if self.compute == "auto":
            return torch.bfloat16 if device.type == "cuda" else torch.float32
        return _DTYPES[self.compute]

    def parameter_dtype(self) -> torch.dtype:
        """Return the dtype of initial weights, master weights and gradients."""
        return torch.float64 if self.compute == "float64" else torch.float32

    def build_fp8_ops(self, device: torch.device) -> Fp8LinearOps | None:
        """Return the FP8 operations of the Linears, or None if they do not compute in FP8."""
        if self.linear != "fp8":
            return None
        return Fp8LinearOps(open_backend(self.fp8_backend, device), ScaleFormat(self.fp8_scale_format))
