"""Checks of disk and hardware before a run's first process exists.

Lower bounds on processes and memory reject a run that cannot start on this machine. They are far below what it really
needs, which `shoestring memory` predicts, and cost nothing to compute.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ...comm.errors import ConfigError, Problem, collect_problems, raise_if_any
from ...comm.exchange.deepep import deepep_problems
from ...comm.units import format_giga
from ...trainer.build import dispatch_buffer_shape, open_samples
from ...trainer.checkpoint.compatibility import resume_problems, start_from_problems
from ...trainer.checkpoint.find import find_checkpoint, unreadable_checkpoint_error
from ...trainer.checkpoint.store import CheckpointStore, no_intact_checkpoint_error
from ...trainer.config import RunConfig
from ...trainer.data.manifest import DataManifest
from ...trainer.data.prepared import open_prepared_data, tokenizer_problems, verify_before_run
from ...trainer.ledger.budget_guard import compute_budget_accounts, gpu_hours_left_in_project
from ...trainer.ledger.checkpoint_totals import ledger_problems
from ...trainer.ledger.journal import refuse_if_locked
from ...trainer.ledger.project import Project
from ...trainer.ledger.summary import summarize_ledger
from ...trainer.ledger.terms import ALLOCATION_FILE, WORK_FILE
from ...trainer.model.attention_backend import CONFIG_KEY, GpuCapabilities, select_attention
from ...trainer.precision.backend import choose_backend, unavailable_reasons
from ...trainer.run.checkpointing import remove_partial_saves
from .rank_environment import build_rank_environment, uses_gpus
from .run_dir import read_run_status, run_dir_problems

MIN_PROCESS_BYTES = 150e6
"""Resident, unshared bytes of a process that has imported torch: 180 MB measured with torch 2.13 (CPU)."""
MAX_RANKS_PER_CORE = 32
"""Limit for ranks that compute on CPUs. Two ranks on one core double the time of a step; 32 take minutes."""
_CGROUP = Path("/sys/fs/cgroup")
_THREADS_PER_RANK = 4


def run_preflight_checks(config: RunConfig, local_ranks: int, *, fresh: bool, is_first_node: bool = True) -> None:
    """Raise `ConfigError` with everything that keeps the run from starting on this machine or in its run directory.

    Checked: prepared data (missing, damaged, too short), GPUs, FP8 and attention backends, DeepEP, the wandb account,
    the Prometheus port, the budget, the run directory and its checkpoint. `is_first_node`: this node owns the run
    directory and reports for the run.
    """
    on_gpu = uses_gpus(config.training.device, local_ranks)
    # These first, and alone: the checks below take time and memory that grow with the sizes checked here.
    raise_if_any(
        capacity_problems(config, local_ranks, MachineCapacity.detect(on_gpu=on_gpu and torch.cuda.is_available()))
    )
    problems: list[Problem] = []
    data = None
    with collect_problems(problems):
        prepared = open_prepared_data(config.data)
        data = prepared.manifest
        open_samples(config, prepared)
        if is_first_node:
            problems += tokenizer_problems(config.data, prepared)
        verify_before_run(Path(config.data.prepared), prepared, first_machine=is_first_node)
    problems += hardware_problems(config, local_ranks)
    if is_first_node and config.telemetry.wandb.mode == "online":
        from ...trainer.telemetry.wandb_sink import (
            wandb_account_problems,  # the import takes a second, so only runs that use wandb pay for it
        )

        problems += wandb_account_problems()
    if is_first_node and config.telemetry.prometheus.port is not None:
        from ...trainer.telemetry.prometheus_sink import port_problems  # only runs that are scraped need its library

        problems += port_problems(config.telemetry.prometheus)
    with collect_problems(problems):
        problems += budget_problems(config, fresh=fresh)
    foreign = list(run_dir_problems(Path(config.training.run_dir)))
    with collect_problems(problems):
        if not foreign:
            problems += _checkpoint_problems(config, data, fresh=fresh)
    raise_if_any([*problems, *foreign])


def _checkpoint_problems(config: RunConfig, data: DataManifest | None, *, fresh: bool) -> Iterator[Problem]:
    """Yield problems of the newest intact checkpoint, else of the checkpoint that a new run starts from."""
    try:
        checkpoint, damaged = (None, []) if fresh else _store(config).open_last_intact()
    except OSError as error:
        raise unreadable_checkpoint_error(error) from error
    if checkpoint is not None:
        yield from resume_problems(checkpoint.manifest.metadata, config, data)
        if "ledger" in checkpoint.manifest.metadata:
            yield from ledger_problems(Path(config.training.run_dir), checkpoint.manifest.metadata["ledger"])
    elif damaged:
        raise no_intact_checkpoint_error(damaged)
    elif config.training.start_from is not None:
        start, run_dir = Path(config.training.start_from), Path(config.training.run_dir)
        if fresh and Path(os.path.realpath(start)).is_relative_to(os.path.realpath(run_dir)):
            yield Problem("training.start_from", str(start), f"is in {run_dir}, which --fresh empties; move it first")
        yield from start_from_problems(find_checkpoint(start), config, data)


def delete_partial_checkpoints(config: RunConfig) -> None:
    """Delete the unfinished checkpoints of earlier attempts.

    Raises `ConfigError` while another process trains in the same directory, since its save may be in progress.
    """
    refuse_if_locked(Path(config.training.run_dir) / WORK_FILE)
    remove_partial_saves(_store(config))


def is_run_finished(config: RunConfig) -> bool:
    """Return whether the run directory holds a run that completed all configured steps and exited with 0."""
    steps, status = _store(config).steps(), read_run_status(Path(config.training.run_dir))
    return bool(steps) and steps[-1] >= config.total_steps and status is not None and status["exit_code"] == 0


def budget_blocker(config: RunConfig) -> str | None:
    """Return why no further step may be trained, or None.

    A budget is used up, or would be before the last step at the cost of the recent steps. Raises `ConfigError` for a
    damaged ledger.
    """
    run_dir = Path(config.training.run_dir)
    steps = _store(config).steps()
    tokens_left = max(0, config.tokens_after(config.total_steps) - config.tokens_after(steps[-1] if steps else 0))
    if not (run_dir / ALLOCATION_FILE).exists() or tokens_left == 0:
        return None
    ramp_steps = config.batch_ramp.levels[-1].steps_before
    found = compute_budget_accounts(config.budget, summarize_ledger(run_dir), run_dir, tokens_left, ramp_steps)
    reasons = (account.halt_reason(config.budget.stop_at) for account in found)
    return next((reason for reason in reasons if reason is not None), None)


def budget_problems(config: RunConfig, *, fresh: bool = False) -> Iterator[Problem]:
    """Yield problems of the run with its project file and its plan."""
    budget, run_dir = config.budget, Path(config.training.run_dir)
    left, name = budget.gpu_hours, "budget.gpu_hours"
    if budget.project is not None:
        project = Project.read(Path(budget.project))
        if not project.has_run(run_dir):
            hint = f"is not among the runs of {budget.project}; add it there, so that its cost is counted"
            yield Problem("training.run_dir", str(run_dir), hint)
        if budget.phase not in project.gpu_hours:
            yield Problem("budget.phase", budget.phase, f"has no budget in {budget.project}; add it under gpu_hours")
        shared = gpu_hours_left_in_project(budget, run_dir)
        assert shared is not None
        left, name = min((left, name), (shared, f"the remaining budget in {budget.project}"))
        if fresh and (run_dir / ALLOCATION_FILE).exists():
            hint = "would erase this run's cost from the project; use another run directory and list it there"
            yield Problem("--fresh", True, hint)
        if shared == 0.0:
            yield Problem(
                "budget.project", budget.project, f"the budget of {budget.phase} is used up; raise gpu_hours there"
            )
    plan = budget.planned_gpu_hours
    if plan is not None and plan > left and not budget.allow_over_plan:
        hint = f"exceeds {name}, {left:.6g}; plan for less, raise it, or write budget.allow_over_plan=true"
        yield Problem("budget.planned_gpu_hours", plan, hint, ("budget.gpu_hours", "budget.project"))


def _store(config: RunConfig) -> CheckpointStore:
    return CheckpointStore(Path(config.training.run_dir) / "checkpoints", config.training.keep_checkpoints)


def hardware_problems(config: RunConfig, local_ranks: int) -> Iterator[Problem]:
    """Yield a problem for each GPU, library or kernel that `local_ranks` ranks need and this machine lacks."""
    gpus, device = torch.cuda.device_count(), config.training.device
    on_gpu = device != "cpu" and gpus >= local_ranks
    if device == "cuda" and gpus < local_ranks:
        hint = f"{local_ranks} ranks need one GPU each, this machine has {gpus}; write auto or cpu, or use fewer ranks"
        yield Problem("training.device", "cuda", hint)
    gpu_dtype = config.precision.compute_dtype(torch.device("cuda"))
    if config.exchange.name == "deepep":
        shape, ep = dispatch_buffer_shape(config), config.topology.ep
        yield from deepep_problems(shape, ep, gpu_dtype, device, local_ranks, build_rank_environment())
    if config.precision.linear == "fp8":
        name = config.precision.fp8_backend
        for reason in unavailable_reasons(choose_backend(name, on_gpu=on_gpu), on_gpu=on_gpu):
            yield Problem("precision.fp8_backend", name, reason)
    attention = config.training.attention_backend
    if on_gpu:
        try:
            select_attention(attention, config.attention_shape(gpu_dtype), GpuCapabilities.detect())
        except ConfigError as error:
            yield from error.problems
    elif attention != "auto" and device == "auto":
        hint = f"is for GPUs, and this machine has {gpus} for {local_ranks} ranks; write auto, or use fewer ranks"
        yield Problem(CONFIG_KEY, attention, hint)


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
    # Parameters of feed-forward networks, embedding and head, without attention and norms.
    model = config.model
    routed = model.num_moe_layers * (model.n_routed_experts + model.n_shared_experts) * model.moe_intermediate_size
    dense = model.first_k_dense_replace * model.intermediate_size
    parameters = model.hidden_size * (3 * (routed + dense) + 2 * model.vocab_size)
    # 9 bytes per parameter: an FP8 weight (1), an FP32 master (4), two BF16 moments (2 each), sharded over all ranks.
    size = parameters * 9.0 / config.topology.world_size
    yield f"{parameters:.3g} parameters and their optimizer state", ("model", model.name), size
    tokens = config.schedule.micro_batch_size * config.training.sequence_length
    key = ("training.sequence_length", config.training.sequence_length)
    yield f"one activation of the {tokens:,} tokens of a micro-batch", key, 2.0 * tokens * model.hidden_size
