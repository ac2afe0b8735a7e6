"""`shoestring memory`: predicted memory of each rank by kind, and measured memory of real processes."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch

from ...comm.errors import ConfigError, Problem, raise_if_any
from ...trainer.build import build_stage_layout
from ...trainer.config import RunConfig
from ...trainer.memory.forecast import HostMemoryBytes, MemoryPredictor
from ...trainer.memory.measured import MeasuredMemory, measure_step_memory
from ...trainer.memory.peak import RankMemory, memory_label
from ..answers.blocks import Answer, Block, Cell, Paragraph, Quantity, TableBlock, TableRow, number, table
from ..answers.options import add_override_arguments
from ..compose import compose_run_config
from ..run.on_ranks import RankContext, run_on_ranks
from ..run.preflight import hardware_problems
from ..run.worker import print_unused_gpus

_SECONDS = 900.0
_STATE = "model states"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    add_override_arguments(parser)
    parser.add_argument(
        "--measure", action="store_true", help="run two steps of all ranks on this machine, and compare"
    )
    text = "with --measure: route all tokens of each expert-parallel group to one rank"
    parser.add_argument("--one-rank", action="store_true", help=text)


def answer(options: argparse.Namespace) -> Answer:
    """Predict the memory of the run that the options describe; with --measure run its real ranks on this machine too.

    Raises `ConfigError`, and `RanksFailed`.
    """
    if options.one_rank and not options.measure:
        raise ConfigError([Problem("--one-rank", True, "needs --measure too")])
    config = compose_run_config(options.overrides, options.config_dir)
    if not options.measure:
        return memory_answer(config, _device(config))
    raise_if_any(hardware_problems(config, config.topology.world_size))
    ranks = run_on_ranks(
        measure_rank,
        (config, options.one_rank),
        config.topology.world_size,
        device=config.training.device,
        timeout=timedelta(seconds=config.training.collective_timeout_seconds),
        seconds=_SECONDS,
    )
    device, measured = ranks[0][0].partition(":")[0], [memory for _, memory in ranks]
    return memory_answer(config, device, measured, all_tokens_to_one_rank=options.one_rank)


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


def memory_answer(
    config: RunConfig,
    device: str,
    measured_by_rank: Sequence[MeasuredMemory] = (),
    *,
    all_tokens_to_one_rank: bool = False,
) -> Answer:
    """Return the prediction for each pipeline rank with balanced routing, and its errors, in bytes.

    `device` is cpu or cuda. `all_tokens_to_one_rank`: the measured run routed all tokens of each expert-parallel group
    to one rank.
    """
    predictor, pp_ranks = MemoryPredictor(config, torch.device(device)), range(config.topology.pp)
    title = f"Predicted memory of one rank per pipeline rank on {'a GPU' if device == 'cuda' else 'a CPU'}"
    ranks, host_bytes = [*map(predictor.predict_rank, pp_ranks)], [*map(predictor.predict_host, pp_ranks)]
    bounds = [*map(predictor.upper_bound_bytes, pp_ranks)]
    compared: list[dict[str, Any]] = []
    for rank, measured in enumerate(measured_by_rank):
        rows = predictor.skewed_expert_rows(config.topology.ep_rank(rank)) if all_tokens_to_one_rank else None
        compared += _compare(rank, predictor.predict_rank(config.topology.pp_rank(rank), rows), measured)
    data = {
        "device": device,
        "predicted": [_rank_tree(memory) for memory in ranks],
        "host_bytes": [vars(host) for host in host_bytes],
        "worst_case_routing_bytes": bounds,
        "measured": [asdict(memory) for memory in measured_by_rank],
        "predicted_and_measured": compared,
        "routing_measured": "all_to_one_rank" if all_tokens_to_one_rank else "model",
    }
    blocks: list[Block] = [_predicted(f"{title}, MB", ranks, host_bytes, bounds)]
    if compared:
        routing = "all tokens to one rank per group" if all_tokens_to_one_rank else "model's own routing"
        blocks += [_compared(routing, compared), Paragraph(_MEASUREMENT_NOTES[device])]
    return Answer.from_blocks(title, data, blocks)


def _rank_tree(memory: RankMemory) -> dict[str, Any]:
    return {
        "state": vars(memory.state),
        "peak": {kind.value: size for kind, size in memory.at_peak.items()},
        "between_instructions": memory.between_instructions,
        "outside_allocator": vars(memory.non_allocator),
        "total": memory.total,
    }


def _predicted(
    title: str, ranks: Sequence[RankMemory], hosts: Sequence[HostMemoryBytes], bounds: Sequence[float]
) -> TableBlock:
    kinds = [dict(_kinds(memory)) for memory in ranks]
    rows = [_row(kind, [of_rank[kind] for of_rank in kinds]) for kind in kinds[0] if any(row[kind] for row in kinds)]
    rows.append(_row("peak", [memory.total for memory in ranks], is_total=True))
    rows.append(_row("worst-case routing", bounds))
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


def _compare(rank: int, predicted: RankMemory, measured: MeasuredMemory) -> Iterator[dict[str, Any]]:
    """Yield predicted and measured bytes of a rank by quantity."""
    for quantity, ours, theirs in (
        (_STATE, predicted.state.total, measured.state.total),
        ("between instructions", predicted.between_instructions, measured.between_instructions),
        ("peak", predicted.allocator_bytes, measured.total),
    ):
        sizes = {"predicted_bytes": ours, "measured_bytes": theirs, "relative_error": ours / theirs - 1}
        yield {"rank": rank, "quantity": quantity, **sizes}


def _compared(routing: str, compared: Sequence[Mapping[str, Any]]) -> TableBlock:
    rows = []
    for each in compared:
        is_first = each["quantity"] == _STATE
        rank: Cell = number(each["rank"]) if is_first else ""
        sizes = _mega(each["predicted_bytes"]), _mega(each["measured_bytes"]), number(each["relative_error"], "+.1%")
        rows.append(TableRow((rank, each["quantity"], *sizes), begins_group=is_first))
    headings = ("rank", "quantity", "predicted", "measured", "difference")
    return table(f"Predicted and measured, MB; {routing}", headings, rows)


_MEASUREMENT_NOTES = {
    "cpu": "Measured: all of torch's allocations in all threads of the rank, by its profiler; without buffers of gloo "
    "and of math libraries, and without the interpreter.",
    "cuda": "Measured: the peak of torch's caching allocator; without the CUDA context and NCCL.",
}


def _mega(size: float) -> Quantity:
    return number(size, ",.2f", scale=1e-6)
