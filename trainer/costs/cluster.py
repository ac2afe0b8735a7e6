"""Hardware of a run: the peak TFLOPS behind MFU, and the speeds and prices behind the planner's predictions."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from ...comm.errors import Problem
from ...comm.groups import Group


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """GPUs of the cluster and their links. On a CPU one process counts as one GPU.

    A figure that is neither published nor measured is null; the planner then refuses predictions that need it.
    """

    name: str = "local"
    """Name of the cluster in logs."""
    peak_tflops: float | None = None
    """Dense peak TFLOPS per GPU, in the format that MFU is quoted in (BF16 for H800); null: measured at the start by a
    matrix product."""
    peak_fp8_tflops: float | None = None
    """Dense peak TFLOPS per GPU in FP8; null: no FP8."""
    memory_gb: float | None = None
    """Memory per GPU in GB (10^9 bytes)."""
    memory_gb_per_second: float | None = None
    """Memory bandwidth per GPU in GB/s."""
    sm_count: int | None = None
    """Streaming multiprocessors per GPU, which compute and communication kernels share."""
    nodes: int = 1
    """Number of nodes."""
    gpus_per_node: int = 8
    """GPUs per node."""
    nvlink_gb_per_second: float | None = None
    """Bandwidth from one GPU to the others of its node, in GB/s per direction, as kernels reach it."""
    infiniband_gb_per_second: float | None = None
    """Bandwidth from one GPU to other nodes, in GB/s per direction, as kernels reach it."""
    price_per_gpu_hour: float | None = None
    """Price in US dollars per GPU-hour."""
    tables: str | None = None
    """Measured kernel times: the name of a table of the planner, or a CSV file written by `shoestring calibrate`."""
    sources: dict[str, str] = field(default_factory=dict)
    """Source of each figure above, as a mapping from field name to text."""

    @property
    def total_gpus(self) -> int:
        """GPUs of all nodes."""
        return self.nodes * self.gpus_per_node

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for each invalid value."""
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
                yield Problem(name, values[name], "must be greater than 0, or null if unknown")
        if self.price_per_gpu_hour is not None and self.price_per_gpu_hour < 0:
            yield Problem("price_per_gpu_hour", self.price_per_gpu_hour, "must be at least 0, or null")
        for name in ("nodes", "gpus_per_node"):
            if values[name] < 1:
                yield Problem(name, values[name], "must be at least 1")


def measure_peak_tflops(device: torch.device, dtype: torch.dtype, group: Group) -> float:
    """Return the mean TFLOPS per rank of a square matrix product that all ranks of `group` run at the same time.

    It replaces a published peak where there is none. Collective.
    """
    # All ranks at the same time: several processes on one CPU share its peak.
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
