"""The hardware a run is on: the peak that utilisation is measured against."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ...comm.groups import Group
from ...comm.refusal import Problem


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """One GPU of the cluster. On a CPU one process counts as one GPU."""

    name: str = "local"
    """For logs."""
    peak_tflops: float | None = None
    """Dense peak of one GPU in the format that MFU is quoted in (BF16 for H800); null to measure a matrix product."""

    def problems(self) -> Iterator[Problem]:
        """What is impossible about these values on their own."""
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            yield Problem("peak_tflops", self.peak_tflops, "must be greater than 0, or null to measure it at the start")


def measure_peak_tflops(device: torch.device, dtype: torch.dtype, group: Group) -> float:
    """TFLOPS a rank of a square matrix product while all ranks of `group` run it, mean over them.

    A stand-in for a published peak where there is none: with several processes on one CPU each gets its share.
    """
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    out = a @ b
    group.barrier("start of the peak's measurement")
    repetitions, seconds = 0, 0.0
    start = time.perf_counter()
    while seconds < 0.2:
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        repetitions += 1
        seconds = time.perf_counter() - start
    rate = torch.tensor([2.0 * size**3 * repetitions / seconds / 1e12], dtype=torch.float64)
    return float(group.all_reduce_sum(rate, "mean of the measured peak").item()) / group.size
