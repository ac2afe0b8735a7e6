"""Which numeric format computes."""

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
    """Master weights and gradients are FP32 (FP64 when computing in it); `compute` is for all between.

    It is what weights are kept in, too, but for norms and routers: see `trainer.run.bucket_plan.plan_buckets`.
    """

    compute: str = "auto"
    """`float32`, `bfloat16`, `float64`, or `auto`: BF16 on a GPU, FP32 elsewhere."""
    linear: str = "native"
    """Products of the Linears but the head's: `native` (in `compute`), or `fp8` as in the report (§3.3)."""
    fp8_backend: str = "auto"
    """What computes in FP8: see `shoestring doctor`; `auto` takes the fastest that serves the device."""
    fp8_scale_format: str = "fp32"
    """Of FP8 tiles: `fp32`, or `power_of_two`. Those that the report wants to be powers of two always are."""

    def problems(self) -> Iterator[Problem]:
        """What is impossible about these values on their own."""
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
                    name, self.__dict__[name], "is for FP8: write linear=fp8 too, or leave it out", ("linear",)
                )

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        """The dtype of activations."""
        if self.compute == "auto":
            return torch.bfloat16 if device.type == "cuda" else torch.float32
        return _DTYPES[self.compute]

    def parameter_dtype(self) -> torch.dtype:
        """The dtype of initial weights, of their masters and of gradients."""
        return torch.float64 if self.compute == "float64" else torch.float32

    def build_fp8_ops(self, device: torch.device) -> Fp8LinearOps | None:
        """How the Linears compute, where it is in FP8."""
        return (
            Fp8LinearOps(open_backend(self.fp8_backend, device), ScaleFormat(self.fp8_scale_format))
            if self.linear == "fp8"
            else None
        )
