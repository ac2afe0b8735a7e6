"""Which numeric format computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ...comm.refusal import Problem

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Master weights and gradients are FP32 (FP64 when computing in it); `compute` is for all between.

    It is what weights are kept in, too, but for norms and routers: see `trainer.rank.build_optimizer`.
    """

    compute: str = "auto"
    """`float32`, `bfloat16`, `float64`, or `auto`: BF16 on a GPU, FP32 elsewhere."""

    def problems(self) -> Iterator[Problem]:
        """What is impossible about these values on their own."""
        if self.compute != "auto" and self.compute not in _DTYPES:
            yield Problem("compute", self.compute, f"must be auto, {', '.join(_DTYPES)}")

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        """The dtype of activations."""
        if self.compute == "auto":
            return torch.bfloat16 if device.type == "cuda" else torch.float32
        return _DTYPES[self.compute]

    def parameter_dtype(self) -> torch.dtype:
        """The dtype of initial weights, of their masters and of gradients."""
        return torch.float64 if self.compute == "float64" else torch.float32
