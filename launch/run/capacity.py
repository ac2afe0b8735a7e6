"""Whether a run can be started on this machine at all: what its processes and its parameters need at the least.

`shoestring memory` predicts what a run really needs. These bounds are far below that, and cost nothing to know.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ...comm.errors import Problem
from ...trainer.config import RunConfig
from ...trainer.model.config import ModelConfig

MIN_PROCESS_BYTES = 150e6
"""Resident in a process that has imported torch, and not shared with others: 180 MB measured with torch 2.13 (CPU)."""
MAX_RANKS_PER_CORE = 32
"""Ranks that compute on CPUs, at the most. A step of two on one core takes twice as long; of 32, minutes."""
_CGROUP = Path("/sys/fs/cgroup")
_THREADS_A_RANK = 4


@dataclass(frozen=True)
class MachineCapacity:
    """What this machine has for ranks."""

    cpu_cores: int
    host_bytes: float
    gpu_bytes: float | None
    """Of one GPU; None where ranks compute on CPUs."""
    max_tasks: int | None
    """Processes and threads that may be started; None for no limit."""

    @staticmethod
    def detect(*, on_gpu: bool) -> MachineCapacity:
        """Return what the kernel and the control group of this process say."""
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
    """A limit of this process's control group, where it shows one at the top."""
    try:
        text = (_CGROUP / name).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return int(text) if text.isdecimal() else None


def capacity_problems(config: RunConfig, local_ranks: int, capacity: MachineCapacity) -> Iterator[Problem]:
    """What is too large for this machine, whatever else is configured."""
    grid = f"{local_ranks} ranks on this machine"
    if capacity.gpu_bytes is None and local_ranks > MAX_RANKS_PER_CORE * capacity.cpu_cores:
        hint = (
            f"asks for {grid}, which has {capacity.cpu_cores} cores; at most {MAX_RANKS_PER_CORE * capacity.cpu_cores}"
        )
        yield Problem("topology", _grid(config), f"{hint}: write a smaller topology, or use more machines")
    elif local_ranks * MIN_PROCESS_BYTES > capacity.host_bytes:
        needs = f"{local_ranks * MIN_PROCESS_BYTES / 1e9:,.0f} GB for their processes alone"
        yield Problem(
            "topology", _grid(config), f"asks for {grid}, {needs}; it has {capacity.host_bytes / 1e9:,.1f} GB"
        )
    elif capacity.max_tasks is not None and local_ranks * _THREADS_A_RANK > capacity.max_tasks:
        yield Problem(
            "topology", _grid(config), f"asks for {grid}, which may start {capacity.max_tasks} processes and threads"
        )
    needed = minimum_memory_per_rank(config)
    for what, key, size in needed:
        has = capacity.host_bytes / local_ranks if capacity.gpu_bytes is None else capacity.gpu_bytes
        if size > has:
            where = "of this machine's memory" if capacity.gpu_bytes is None else "of memory on a GPU"
            hint = f"a rank needs {size / 1e9:,.0f} GB for {what} alone, and has {has / 1e9:,.1f} GB {where}"
            yield Problem(*key, f"{hint}; see `shoestring memory`")
            return


def minimum_memory_per_rank(config: RunConfig) -> Iterator[tuple[str, tuple[str, object], float]]:
    """Yield what one rank cannot do without: a name, the key and value to blame, and bytes."""
    parameters = parameter_count_lower_bound(config.model)
    # A weight of 1 byte (FP8), a master of 4 and two moments of 2, each on one rank of the run at the least.
    size = parameters * 9.0 / config.topology.world_size
    yield f"{parameters:.3g} parameters and their optimizer state", ("model", config.model.name), size
    tokens = config.schedule.micro_batch_size * config.training.sequence_length
    key = ("training.sequence_length", config.training.sequence_length)
    yield f"one activation of the {tokens:,} tokens of a micro-batch", key, 2.0 * tokens * config.model.hidden_size


def parameter_count_lower_bound(model: ModelConfig) -> int:
    """Return a count that the model's parameters exceed: feed-forward networks, embedding and head."""
    routed = model.num_moe_layers * (model.n_routed_experts + model.n_shared_experts) * model.moe_intermediate_size
    dense = model.first_k_dense_replace * model.intermediate_size
    return model.hidden_size * (3 * (routed + dense) + 2 * model.vocab_size)


def _grid(config: RunConfig) -> str:
    topology = config.topology
    return f"pp={topology.pp} edp={topology.edp} ep={topology.ep}"
