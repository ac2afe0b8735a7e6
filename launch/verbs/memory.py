"""`shoestring memory`: predicted memory of each rank by kind, and measured memory of real processes."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ...comm.errors import ConfigError, Problem, raise_if_any
from ...trainer.build import build_stage_layout
from ...trainer.config import RunConfig
from ...trainer.memory.forecast import HostMemoryBytes, MemoryPredictor
from ...trainer.memory.measured import MeasuredMemory, measure_step_memory
from ...trainer.memory.peak import RankMemory, memory_label
from ..answers.blocks import Answer, Block, Cell, Paragraph, Quantity, TableBlock, TableRow, number, table
from ..answers.options import add_answer_options, add_override_arguments, print_answer
from ..compose import compose_run_config
from ..run.on_ranks import RankContext, run_on_ranks
from ..run.preflight import hardware_problems
from ..run.worker import print_unused_gpus

_SECONDS = 900.0
_STATE = "model states"
_BETWEEN = "between instructions"
_PEAK = "peak"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    add_override_arguments(parser)
    parser.add_argument(
        "--measure", action="store_true", help="run two steps of all ranks on this machine, and compare"
    )
    text = "with --measure: route all tokens of each expert-parallel group to one rank"
    parser.add_argument("--one-rank", action="store_true", help=text)
    add_answer_options(parser)


def run(options: argparse.Namespace) -> int:
    """Print the memory of the run that the options describe."""
    if options.one_rank and not options.measure:
        raise ConfigError([Problem("--one-rank", True, "needs --measure too")])
    report = build_memory_report(
        options.overrides, options.config_dir, measure=options.measure, all_tokens_to_one_rank=options.one_rank
    )
    return print_answer(options, memory_answer(report))


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

    @cached_property
    def worst_case_bytes_by_pp_rank(self) -> list[float]:
        """Bound of each pipeline rank's memory under any routing."""
        return [self.run_memory.upper_bound_bytes(pp_rank) for pp_rank in range(self.config.topology.pp)]

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


def memory_answer(report: MemoryReport) -> Answer:
    """Return the figures, in bytes."""
    on = "a GPU" if report.device == "cuda" else "a CPU"
    title = f"Predicted memory of one rank per pipeline rank on {on}"
    compared = list(_comparisons(report))
    data = {
        "device": report.device,
        "predicted": [_rank_tree(memory) for memory in report.predicted_by_pp_rank],
        "host_bytes": [vars(host) for host in report.host_bytes_by_pp_rank],
        "worst_case_routing_bytes": report.worst_case_bytes_by_pp_rank,
        "measured": [asdict(memory) for memory in report.measured_by_rank],
        "predicted_and_measured": [vars(each) | {"relative_error": each.relative_error} for each in compared],
        "routing_measured": "all_to_one_rank" if report.all_tokens_to_one_rank else "model",
    }
    blocks: list[Block] = [_predicted(report, f"{title}, MB")]
    if compared:
        blocks += [_compared(report, compared), Paragraph(_MEASUREMENT_NOTES[report.device])]
    return Answer.from_blocks(title, data, blocks)


def _rank_tree(memory: RankMemory) -> dict[str, Any]:
    return {
        "state": vars(memory.state),
        "peak": {kind.value: size for kind, size in memory.at_peak.items()},
        "between_instructions": memory.between_instructions,
        "outside_allocator": vars(memory.non_allocator),
        "total": memory.total,
    }


def _predicted(report: MemoryReport, title: str) -> TableBlock:
    ranks, hosts = report.predicted_by_pp_rank, report.host_bytes_by_pp_rank
    kinds = [dict(_kinds(memory)) for memory in ranks]
    rows = [_row(kind, [of_rank[kind] for of_rank in kinds]) for kind in kinds[0] if any(row[kind] for row in kinds)]
    rows.append(_row(_PEAK, [memory.total for memory in ranks], is_total=True))
    rows.append(_row("worst-case routing", report.worst_case_bytes_by_pp_rank))
    rows.append(_row("host, checkpoint staging", [host.copy_for_saves for host in hosts], begins_group=True))
    if any(host.average for host in hosts):
        rows.append(_row("host, EMA", [host.average for host in hosts]))
    return table(title, ("kind", *(f"pp {pp_rank}" for pp_rank in range(len(ranks)))), rows)


def _row(name: str, sizes: Sequence[float], *, is_total: bool = False, begins_group: bool = False) -> TableRow:
    return TableRow((name, *map(_mega, sizes)), is_total=is_total, begins_group=begins_group)


def _kinds(memory: RankMemory) -> Iterator[tuple[str, float]]:
    for name, size in vars(memory.state).items():
        yield memory_label(name), size
    for kind, size in memory.at_peak.items():
        yield memory_label(kind.value), size
    yield "CUDA context, libraries (assumed)", memory.non_allocator.context
    yield "exchange buffers, outside allocator", memory.non_allocator.exchange


@dataclass(frozen=True)
class _Comparison:
    """Predicted and measured bytes of a rank."""

    rank: int
    quantity: str
    predicted_bytes: float
    measured_bytes: float

    @property
    def relative_error(self) -> float:
        return self.predicted_bytes / self.measured_bytes - 1


def _comparisons(report: MemoryReport) -> Iterator[_Comparison]:
    for rank, measured in enumerate(report.measured_by_rank):
        predicted = report.predict_rank(rank)
        yield _Comparison(rank, _STATE, predicted.state.total, measured.state.total)
        yield _Comparison(rank, _BETWEEN, predicted.between_instructions, measured.between_instructions)
        yield _Comparison(rank, _PEAK, predicted.allocator_bytes, measured.total)


def _compared(report: MemoryReport, compared: Sequence[_Comparison]) -> TableBlock:
    routing = "all tokens to one rank per group" if report.all_tokens_to_one_rank else "model's own routing"
    rows = []
    for each in compared:
        is_first = each.quantity == _STATE
        rank: Cell = number(each.rank) if is_first else ""
        sizes = _mega(each.predicted_bytes), _mega(each.measured_bytes), number(each.relative_error, "+.1%")
        rows.append(TableRow((rank, each.quantity, *sizes), begins_group=is_first))
    headings = ("rank", "quantity", "predicted", "measured", "difference")
    return table(f"Predicted and measured, MB; {routing}", headings, rows)


_MEASUREMENT_NOTES = {
    "cpu": "Measured: all of torch's allocations in all threads of the rank, by its profiler; without buffers of gloo "
    "and of math libraries, and without the interpreter.",
    "cuda": "Measured: the peak of torch's caching allocator; without the CUDA context and NCCL.",
}


def _mega(size: float) -> Quantity:
    return number(size, ",.2f", scale=1e-6)
