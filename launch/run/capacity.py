"""Lower bounds on the processes and memory of a run, which reject a run that cannot start on this machine.

`shoestring memory` predicts what a run really needs. These bounds are far lower, and cost nothing to compute.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ...comm.errors import Problem
from ...comm.units import format_giga
from ...trainer.config import RunConfig
from ...trainer.model.config import ModelConfig

MIN_PROCESS_BYTES = 150e6
"""Resident, unshared bytes of a process that has imported torch: 180 MB measured with torch 2.13 (CPU)."""
MAX_RANKS_PER_CORE = 32
"""Limit for ranks that compute on CPUs. Two ranks on one core double the time of a step; 32 take minutes."""
_CGROUP = Path("/sys/fs/cgroup")
_THREADS_PER_RANK = 4


@dataclass(frozen=True)
class MachineCapacity:
    """Cores, memory and process limit of this machine."""

    cpu_cores: int
    host_bytes: float
    gpu_bytes: float | None
    """Memory of one GPU; None if ranks compute on CPUs."""
    max_tasks: int | None
    """Limit on processes and threads; None for no limit."""

    @staticmethod
    def detect(*, on_gpu: bool) -> "MachineCapacity":
        """Read the capacity from the kernel and the control group of this process."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        limit = _limit("memory.max")
        gpu = float(torch.cuda.get_device_properties(0).total_memory) if on_gpu else None
        return MachineCapacity(
            len(os.sched_getaffinity(0)),
            float(memory if limit is None else min(memory, limit)),
            gpu,
            _limit("pids.max"),
        )


def _limit(name: str) -> int | None:
    """Read a limit of this process's control group; None if the root of the hierarchy shows none."""
    try:
        text = (_CGROUP / name).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return int(text) if text.isdecimal() else None


def capacity_problems(config: RunConfig, local_ranks: int, capacity: MachineCapacity) -> Iterator[Problem]:
    """Yield a problem for each part of the run that is too large for this machine."""
    most, lacks = MAX_RANKS_PER_CORE * capacity.cpu_cores, None
    if capacity.gpu_bytes is None and local_ranks > most:
        cores = f"which has {capacity.cpu_cores} cores; at most {most}"
        lacks = f"{cores}: write a smaller topology, or use more nodes"
    elif local_ranks * MIN_PROCESS_BYTES > capacity.host_bytes:
        needs = f"{format_giga(local_ranks * MIN_PROCESS_BYTES, 0)} GB for their processes alone"
        lacks = f"{needs}; it has {format_giga(capacity.host_bytes, 1)} GB"
    elif capacity.max_tasks is not None and local_ranks * _THREADS_PER_RANK > capacity.max_tasks:
        lacks = f"which may start {capacity.max_tasks} processes and threads"
    if lacks is not None:
        topology = config.topology
        grid = f"pp={topology.pp} edp={topology.edp} ep={topology.ep}"
        yield Problem("topology", grid, f"asks for {local_ranks} ranks on this machine, {lacks}")
    for name, key, size in minimum_memory_per_rank(config):
        has = capacity.host_bytes / local_ranks if capacity.gpu_bytes is None else capacity.gpu_bytes
        if size > has:
            kind = "of this machine's memory" if capacity.gpu_bytes is None else "of GPU memory"
            hint = f"a rank needs {format_giga(size, 0)} GB for {name} alone, and has {format_giga(has, 1)} GB {kind}"
            yield Problem(*key, f"{hint}; see `shoestring memory`")
            return


def minimum_memory_per_rank(config: RunConfig) -> Iterator[tuple[str, tuple[str, object], float]]:
    """Yield lower bounds on the memory of one rank: a name, the key and value that cause it, and bytes."""
    parameters = parameter_count_lower_bound(config.model)
    # 9 bytes per parameter: an FP8 weight (1), an FP32 master (4), two BF16 moments (2 each), sharded over all ranks.
    size = parameters * 9.0 / config.topology.world_size
    yield f"{parameters:.3g} parameters and their optimizer state", ("model", config.model.name), size
    tokens = config.schedule.micro_batch_size * config.training.sequence_length
    key = ("training.sequence_length", config.training.sequence_length)
    yield f"one activation of the {tokens:,} tokens of a micro-batch", key, 2.0 * tokens * config.model.hidden_size


def parameter_count_lower_bound(model: ModelConfig) -> int:
    """Return the parameters of feed-forward networks, embedding and head, without attention and norms."""
    routed = model.num_moe_layers * (model.n_routed_experts + model.n_shared_experts) * model.moe_intermediate_size
    dense = model.first_k_dense_replace * model.intermediate_size
    return model.hidden_size * (3 * (routed + dense) + 2 * model.vocab_size)
