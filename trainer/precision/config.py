"""Number formats of compute, weights and FP8 operands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ...comm.errors import Problem
from .backend import BACKEND_NAMES, open_backend
from .fp8 import Fp8LinearOps
from .fp8_tensors import ScaleFormat

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Dtypes of a run. Master weights and gradients are FP32, or FP64 when `compute` is.

    Weights are stored in `compute`, except those of norms and routers: see `trainer.run.bucket_plan.plan_buckets`.
    """

    compute: str = "auto"
    """Dtype of activations and weights: `float32`, `bfloat16`, `float64`, or `auto`: BF16 on a GPU, FP32 elsewhere."""
    linear: str = "native"
    """Number format of all Linears except the head: `native` (that of `compute`), or `fp8` as in report §3.3."""
    fp8_backend: str = "auto"
    """FP8 implementation: `triton`, `torch`, `te`, `reference`, or `auto`, the fastest that the device supports (see
    `shoestring doctor`)."""
    fp8_scale_format: str = "fp32"
    """Format of FP8 scales: `fp32` or `power_of_two`. Scales that are powers of two in the report always are."""

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for each invalid value."""
        if self.compute != "auto" and self.compute not in _DTYPES:
            yield Problem("compute", self.compute, f"must be auto, {', '.join(_DTYPES)}")
        if self.linear not in ("native", "fp8"):
            yield Problem("linear", self.linear, "must be native or fp8")
        if self.fp8_backend not in ("auto", *BACKEND_NAMES):
            yield Problem("fp8_backend", self.fp8_backend, f"must be auto, {', '.join(BACKEND_NAMES)}")
        if self.fp8_scale_format not in list(ScaleFormat):
            yield Problem("fp8_scale_format", self.fp8_scale_format, f"must be {' or '.join(ScaleFormat)}")
        for name, default in (("fp8_backend", "auto"), ("fp8_scale_format", "fp32")):
            if self.linear == "native" and self.__dict__[name] != default:
                yield Problem(
                    name,
                    self.__dict__[name],
                    "is used in FP8 only: set precision.linear=fp8, or remove it",
                    ("linear",),
                )

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
        return (
            Fp8LinearOps(open_backend(self.fp8_backend, device), ScaleFormat(self.fp8_scale_format))
            if self.linear == "fp8"
            else None
        )
