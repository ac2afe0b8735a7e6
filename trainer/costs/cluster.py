"""The hardware a run is on: the peak that utilization is measured against, and what the planner prices with."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from ...comm.errors import Problem
from ...comm.groups import Group


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """One GPU of the cluster, its links, and how many there are. On a CPU one process counts as one GPU.

    What nobody has published or measured is null; the planner then refuses what needs it. `sources` says of every
    figure where it comes from.
    """

    name: str = "local"
    """For logs."""
    peak_tflops: float | None = None
    """Dense peak of one GPU in the format that MFU is quoted in (BF16 for H800); null to measure a matrix product."""
    peak_fp8_tflops: float | None = None
    """Dense peak in FP8; null where there is none."""
    memory_gb: float | None = None
    """Memory of one GPU in 10^9 bytes."""
    memory_gb_per_second: float | None = None
    """Its bandwidth, 10^9 bytes a second."""
    sm_count: int | None = None
    """Streaming multiprocessors, which computing and communication share."""
    nodes: int = 1
    """Machines."""
    gpus_per_node: int = 8
    """GPUs of one machine."""
    nvlink_gb_per_second: float | None = None
    """What one GPU sends to the others of its node, 10^9 bytes a second and direction, as reached by kernels."""
    infiniband_gb_per_second: float | None = None
    """What one GPU sends to other nodes, 10^9 bytes a second and direction, as reached by kernels."""
    price_per_gpu_hour: float | None = None
    """In US dollars."""
    tables: str | None = None
    """Measured kernel times: a table of the planner, by name, or a CSV file such as `shoestring calibrate` writes."""
    sources: dict[str, str] = field(default_factory=dict)
    """Of each figure above."""

    @property
    def total_gpus(self) -> int:
        """All of them."""
        return self.nodes * self.gpus_per_node

    def problems(self) -> Iterator[Problem]:
        """What is impossible about these values on their own."""
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            yield Problem("peak_tflops", self.peak_tflops, "must be greater than 0, or null to measure it at the start")
        values = self.__dict__
        for name in (
            "peak_fp8_tflops",
            "memory_gb",
            "memory_gb_per_second",
            "sm_count",
            "nvlink_gb_per_second",
            "infiniband_gb_per_second",
        ):
            if values[name] is not None and not values[name] > 0:
                yield Problem(name, values[name], "must be greater than 0, or null where it is not known")
        if self.price_per_gpu_hour is not None and self.price_per_gpu_hour < 0:
            yield Problem("price_per_gpu_hour", self.price_per_gpu_hour, "must be at least 0, or null")
        for name in ("nodes", "gpus_per_node"):
            if values[name] < 1:
                yield Problem(name, values[name], "must be at least 1")


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
