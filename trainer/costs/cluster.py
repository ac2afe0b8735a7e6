"""Hardware of a run: the peak TFLOPS behind MFU, and the speeds and prices behind the planner's predictions."""

import time
from dataclasses import dataclass, field

import torch

from ...comm.files.ranges import CheckedConfig, above, at_least
from ...comm.groups import Group


@dataclass(frozen=True, kw_only=True)
class ClusterConfig(CheckedConfig):
    """GPUs of the cluster and their links. On a CPU one process counts as one GPU.

    A figure that is neither published nor measured is null; the planner then refuses predictions that need it.
    """

    name: str = "local"
    """Name of the cluster in logs."""
    peak_tflops: float | None = above(0, None, null="to measure it at the start")
    """Dense peak TFLOPS per GPU, in the format that MFU is quoted in (BF16 for H800); null: measured at the start by a
    matrix product."""
    peak_fp8_tflops: float | None = above(0, None, null="if unknown")
    """Dense peak TFLOPS per GPU in FP8; null: no FP8."""
    memory_gb: float | None = above(0, None, null="if unknown")
    """Memory per GPU in GB (10^9 bytes)."""
    memory_gb_per_second: float | None = above(0, None, null="if unknown")
    """Memory bandwidth per GPU in GB/s."""
    sm_count: int | None = above(0, None, null="if unknown")
    """Streaming multiprocessors per GPU, which compute and communication kernels share."""
    nodes: int = at_least(1, 1)
    """Number of nodes."""
    gpus_per_node: int = at_least(1, 8)
    """GPUs per node."""
    nvlink_gb_per_second: float | None = above(0, None, null="if unknown")
    """Bandwidth from one GPU to the others of its node, in GB/s per direction, as kernels reach it."""
    infiniband_gb_per_second: float | None = above(0, None, null="if unknown")
    """Bandwidth from one GPU to other nodes, in GB/s per direction, as kernels reach it."""
    price_per_gpu_hour: float | None = at_least(0, None)
    """Price in US dollars per GPU-hour."""
    tables: str | None = None
    """Measured kernel times: the name of a table of the planner, or a CSV file written by `shoestring calibrate`."""
    sources: dict[str, str] = field(default_factory=dict)
    """Source of each figure above, as a mapping from field name to text."""

    @property
    def total_gpus(self) -> int:
        """GPUs of all nodes."""
        return self.nodes * self.gpus_per_node


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
