"""`shoestring memory`: the bytes that each rank of a run needs by kind, predicted, and measured in real processes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table

from ...comm.errors import refuse_if_any
from ...trainer.config import RunConfig
from ...trainer.memory.forecast import HostBytes, RunMemory
from ...trainer.memory.measured import MeasuredMemory
from ...trainer.memory.peak import RankMemory
from ..compose import compose_run
from ..run.preflight import hardware_problems
from ..run.torchrun import run_ranks

_SECONDS = 900.0
_BETWEEN = "held between instructions"
_WORST = "at the worst moment"


@dataclass(frozen=True)
class MemoryReport:
    """Of a run."""

    config: RunConfig
    device: str
    """What the prediction is for: cpu or cuda."""
    memory: RunMemory
    measured: list[MeasuredMemory]
    """Of each rank; empty where it was not asked for."""
    one_rank: bool
    """Whether the measured run sent every token to one rank of each group."""

    @cached_property
    def ranks(self) -> list[RankMemory]:
        """Predicted, of each pipeline rank, with even routing."""
        return [self.memory.of(pp_rank) for pp_rank in range(self.config.topology.pp)]

    @cached_property
    def on_host(self) -> list[HostBytes]:
        """Of each pipeline rank, beside the memory that it computes in."""
        return [self.memory.on_host(pp_rank) for pp_rank in range(self.config.topology.pp)]

    def predicted(self, rank: int) -> RankMemory:
        """Of a rank of the whole run, with the routing that was measured."""
        topology = self.config.topology
        rows = self.memory.rows_if_skewed(topology.ep_rank(rank)) if self.one_rank else None
        return self.memory.of(topology.pp_rank(rank), rows)


def memory_report(
    overrides: Sequence[str], config_dir: Path | None, *, measure: bool, one_rank: bool = False
) -> MemoryReport:
    """Predict, and with `measure` run a step of the real ranks on this machine."""
    config = compose_run(overrides, config_dir)
    found: list[MeasuredMemory] = []
    device = _device(config)
    if measure:
        refuse_if_any(hardware_problems(config, config.topology.world_size))
        devices, found = _measure(config, overrides, config_dir, one_rank=one_rank)
        device = devices[0].partition(":")[0]
    return MemoryReport(config, device, RunMemory(config, torch.device(device)), found, one_rank)


def _device(config: RunConfig) -> str:
    """Of the run: on a cluster that is described, its GPUs, whatever is here."""
    if config.training.device != "auto":
        return config.training.device
    return "cuda" if config.cluster.sms is not None or torch.cuda.is_available() else "cpu"


def _measure(
    config: RunConfig, overrides: Sequence[str], config_dir: Path | None, *, one_rank: bool
) -> tuple[list[str], list[MeasuredMemory]]:
    directory = None if config_dir is None else str(config_dir.absolute())
    described = json.dumps([list(overrides), directory, one_rank])
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "memory.json"
        rank = ["-m", "shoestring.launch.bench.memory_rank", described, str(output)]
        run_ranks(rank, config.topology.world_size, _SECONDS)
        everyone = json.loads(output.read_text())
    return [device for device, _ in everyone], [MeasuredMemory.of_tree(tree) for _, tree in everyone]


def memory_tree(report: MemoryReport) -> dict[str, object]:
    """The figures as plain values, in bytes."""
    return {
        "device": report.device,
        "predicted": [_rank_tree(memory) for memory in report.ranks],
        "on_host": [vars(host) for host in report.on_host],
        "bound_under_any_routing": [report.memory.bound(pp_rank) for pp_rank in range(len(report.ranks))],
        "measured": [memory.tree() for memory in report.measured],
        "routing_measured": "one rank" if report.one_rank else "as it falls",
    }


def _rank_tree(memory: RankMemory) -> dict[str, Any]:
    return {
        "state": vars(memory.state),
        "at_worst": {kind.value: size for kind, size in memory.at_worst.items()},
        "between": memory.between,
        "outside_of_allocator": vars(memory.outside),
        "total": memory.total,
    }


def memory_table(report: MemoryReport) -> RenderableType:
    """The same for a reader."""
    parts: list[RenderableType] = [_predicted(report)]
    if report.measured:
        parts += [_compared(report), _SEEN[report.device]]
    return Group(*parts)


def _predicted(report: MemoryReport) -> Table:
    on = "a GPU" if report.device == "cuda" else "a CPU"
    title = f"Predicted memory of one rank of each pipeline rank on {on}, MB"
    table = Table(title=title, title_justify="left")
    table.add_column("kind")
    for pp_rank in range(len(report.ranks)):
        table.add_column(f"pp {pp_rank}", justify="right")
    rows = [dict(_kinds(memory)) for memory in report.ranks]
    for kind in rows[0]:
        if any(row[kind] for row in rows):
            table.add_row(kind, *(_mega(row[kind]) for row in rows))
    table.add_section()
    table.add_row(_WORST, *(_mega(memory.total) for memory in report.ranks))
    bounds = (report.memory.bound(pp_rank) for pp_rank in range(len(report.ranks)))
    table.add_row("under any routing, at most", *(_mega(bound) for bound in bounds))
    table.add_section()
    table.add_row("on the host, for saves", *(_mega(host.copy_for_saves) for host in report.on_host))
    if any(host.average for host in report.on_host):
        table.add_row("on the host, average", *(_mega(host.average) for host in report.on_host))
    return table


def _kinds(memory: RankMemory) -> Iterator[tuple[str, float]]:
    names = {"fp8_weights": "weights in FP8", "average": "average of the weights"}
    for name, size in vars(memory.state).items():
        yield names.get(name, name), size
    for kind, size in memory.at_worst.items():
        yield kind.value, size
    yield "CUDA context, libraries (assumed)", memory.outside.context
    yield "exchange buffers", memory.outside.exchange


def _compared(report: MemoryReport) -> Table:
    how = "every token to one rank of each group" if report.one_rank else "routing as it falls"
    table = Table(title=f"Predicted and measured, MB; {how}", title_justify="left")
    for heading in ("rank", "what", "predicted", "measured", "difference"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for rank, measured in enumerate(report.measured):
        predicted = report.predicted(rank)
        rows = {
            "state": (predicted.state.total, measured.state.total),
            _BETWEEN: (predicted.between, measured.between),
            _WORST: (predicted.allocated, measured.total),
        }
        for what, (ours, found) in rows.items():
            cells = _mega(ours), _mega(found), f"{ours / found - 1:+.1%}"
            table.add_row(str(rank) if what == "state" else "", what, *cells, end_section=what == _WORST)
    return table


_SEEN = {
    "cpu": "Measured: every allocation of torch in all threads of the rank, by its profiler. It does not see buffers "
    "of gloo and of math libraries, nor the interpreter.",
    "cuda": "Measured: the peak of torch's caching allocator. It does not see the CUDA context and NCCL.",
}


def _mega(size: float) -> str:
    return f"{size / 1e6:,.2f}"
