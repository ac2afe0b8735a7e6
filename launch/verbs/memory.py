"""`shoestring memory`: predicted memory of each rank by kind, and measured memory of real processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table

from ...comm.errors import raise_if_any
from ...comm.units import format_mega
from ...trainer.build import build_stage_layout
from ...trainer.config import RunConfig
from ...trainer.memory.forecast import HostMemoryBytes, MemoryPredictor
from ...trainer.memory.measured import MeasuredMemory, measure_step_memory
from ...trainer.memory.peak import MEMORY_LABELS, RankMemory
from ..compose import compose_run_config
from ..run.on_ranks import RankContext, run_on_ranks
from ..run.preflight import hardware_problems
from ..run.worker import print_unused_gpus

_SECONDS = 900.0
_STATE = "model states"
_BETWEEN = "between instructions"
_PEAK = "peak"


@dataclass(frozen=True)
class MemoryReport:
    """Predicted and measured memory of a run."""

    config: RunConfig
    device: str
    """Device of the prediction: cpu or cuda."""
    run_memory: MemoryPredictor
    measured_by_rank: list[MeasuredMemory]
    """Measured memory of each rank; empty without `--measure`."""
    all_tokens_to_one_rank: bool
    """True if the measured run routed all tokens of each expert-parallel group to one rank."""

    @cached_property
    def predicted_by_pp_rank(self) -> list[RankMemory]:
        """Prediction for each pipeline rank, with balanced routing."""
        return [self.run_memory.predict_rank(pp_rank) for pp_rank in range(self.config.topology.pp)]

    @cached_property
    def host_bytes_by_pp_rank(self) -> list[HostMemoryBytes]:
        """Host memory of each pipeline rank, besides that of its device."""
        return [self.run_memory.predict_host(pp_rank) for pp_rank in range(self.config.topology.pp)]

    def predict_rank(self, rank: int) -> RankMemory:
        """Predict the memory of a global rank, with the routing of the measured run."""
        topology = self.config.topology
        rows = self.run_memory.skewed_expert_rows(topology.ep_rank(rank)) if self.all_tokens_to_one_rank else None
        return self.run_memory.predict_rank(topology.pp_rank(rank), rows)


def build_memory_report(
    overrides: Sequence[str], config_dir: Path | None, *, measure: bool, all_tokens_to_one_rank: bool = False
) -> MemoryReport:
    """Predict the memory of a run; with `measure` also run the real ranks on this machine."""
    config = compose_run_config(overrides, config_dir)
    found: list[MeasuredMemory] = []
    device = _device(config)
    if measure:
        raise_if_any(hardware_problems(config, config.topology.world_size))
        ranks = run_on_ranks(
            measure_rank,
            (config, all_tokens_to_one_rank),
            config.topology.world_size,
            device=config.training.device,
            timeout=timedelta(seconds=config.training.collective_timeout_seconds),
            seconds=_SECONDS,
        )
        found = [memory for _, memory in ranks]
        device = ranks[0][0].partition(":")[0]
    return MemoryReport(config, device, MemoryPredictor(config, torch.device(device)), found, all_tokens_to_one_rank)


def _device(config: RunConfig) -> str:
    """Return the device of the run: for a described cluster its GPUs, else this machine's."""
    if config.training.device != "auto":
        return config.training.device
    return "cuda" if config.cluster.sm_count is not None or torch.cuda.is_available() else "cpu"


def measure_rank(rank: RankContext, argument: tuple[RunConfig, bool]) -> tuple[str, MeasuredMemory]:
    """Run steps on random tokens; return this rank's device and memory. The argument: `skewed` follows the run."""
    config, skewed = argument
    print_unused_gpus(config.training.device, rank)
    groups = rank.open_groups(config.topology, build_stage_layout(config).replica_pp_groups())
    return str(rank.device), measure_step_memory(config, groups, rank.device, skewed=skewed)


def memory_as_dict(report: MemoryReport) -> dict[str, object]:
    """Return the figures as plain values, in bytes."""
    return {
        "device": report.device,
        "predicted": [_rank_tree(memory) for memory in report.predicted_by_pp_rank],
        "host_bytes": [vars(host) for host in report.host_bytes_by_pp_rank],
        "worst_case_routing_bytes": [
            report.run_memory.upper_bound_bytes(pp_rank) for pp_rank in range(len(report.predicted_by_pp_rank))
        ],
        "measured": [memory.to_dict() for memory in report.measured_by_rank],
        "routing_measured": "all_to_one_rank" if report.all_tokens_to_one_rank else "model",
    }


def _rank_tree(memory: RankMemory) -> dict[str, Any]:
    return {
        "state": vars(memory.state),
        "peak": {kind.value: size for kind, size in memory.at_peak.items()},
        "between_instructions": memory.between_instructions,
        "outside_allocator": vars(memory.non_allocator),
        "total": memory.total,
    }


def memory_table(report: MemoryReport) -> RenderableType:
    """Return the figures as tables."""
    parts: list[RenderableType] = [_predicted(report)]
    if report.measured_by_rank:
        parts += [_compared(report), _MEASUREMENT_NOTES[report.device]]
    return Group(*parts)


def _predicted(report: MemoryReport) -> Table:
    on = "a GPU" if report.device == "cuda" else "a CPU"
    title = f"Predicted memory of one rank per pipeline rank on {on}, MB"
    table = Table(title=title, title_justify="left")
    table.add_column("kind")
    for pp_rank in range(len(report.predicted_by_pp_rank)):
        table.add_column(f"pp {pp_rank}", justify="right")
    rows = [dict(_kinds(memory)) for memory in report.predicted_by_pp_rank]
    for kind in rows[0]:
        if any(row[kind] for row in rows):
            table.add_row(kind, *(format_mega(row[kind]) for row in rows))
    table.add_section()
    table.add_row(_PEAK, *(format_mega(memory.total) for memory in report.predicted_by_pp_rank))
    bounds = (report.run_memory.upper_bound_bytes(pp_rank) for pp_rank in range(len(report.predicted_by_pp_rank)))
    table.add_row("worst-case routing", *(format_mega(bound) for bound in bounds))
    table.add_section()
    table.add_row(
        "host, checkpoint staging", *(format_mega(host.copy_for_saves) for host in report.host_bytes_by_pp_rank)
    )
    if any(host.average for host in report.host_bytes_by_pp_rank):
        table.add_row("host, EMA", *(format_mega(host.average) for host in report.host_bytes_by_pp_rank))
    return table


def _kinds(memory: RankMemory) -> Iterator[tuple[str, float]]:
    for name, size in vars(memory.state).items():
        yield MEMORY_LABELS[name], size
    for kind, size in memory.at_peak.items():
        yield MEMORY_LABELS[kind.value], size
    yield "CUDA context, libraries (assumed)", memory.non_allocator.context
    yield "exchange buffers, outside allocator", memory.non_allocator.exchange


def _compared(report: MemoryReport) -> Table:
    routing = "all tokens to one rank per group" if report.all_tokens_to_one_rank else "model's own routing"
    table = Table(title=f"Predicted and measured, MB; {routing}", title_justify="left")
    for heading in ("rank", "quantity", "predicted", "measured", "difference"):
        table.add_column(heading, justify="left" if heading == "quantity" else "right")
    for rank, measured in enumerate(report.measured_by_rank):
        predicted = report.predict_rank(rank)
        rows = {
            _STATE: (predicted.state.total, measured.state.total),
            _BETWEEN: (predicted.between_instructions, measured.between_instructions),
            _PEAK: (predicted.allocator_bytes, measured.total),
        }
        for name, (expected, found) in rows.items():
            cells = format_mega(expected), format_mega(found), f"{expected / found - 1:+.1%}"
            table.add_row(str(rank) if name == _STATE else "", name, *cells, end_section=name == _PEAK)
    return table


_MEASUREMENT_NOTES = {
    "cpu": "Measured: all of torch's allocations in all threads of the rank, by its profiler; without buffers of gloo "
    "and of math libraries, and without the interpreter.",
    "cuda": "Measured: the peak of torch's caching allocator; without the CUDA context and NCCL.",
}
