"""`shoestring partition`: layers, parameters and FLOPs of each pipeline stage."""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...comm.errors import ConfigError, Problem, raise_if_any
from ...parallelism.pipeline.partition import LayerPartition, partition_problems
from ...parallelism.pipeline.placement import StagePlacement
from ...parallelism.pipeline.schedules.registry import SCHEDULES, build_placement, schedule_problems
from ...trainer.costs.flops import FLOP_CONVENTION, ModelPartCosts, count_part_costs
from ...trainer.model.config import ModelConfig
from ...trainer.model.stage_layout import split_layers
from ..answers.blocks import Answer, Formats, Paragraph, records_table
from ..answers.options import add_override_arguments
from .params import compose_model_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    add_override_arguments(parser)
    parser.add_argument("--stages", type=int, required=True, metavar="N", help="number of pipeline stages")
    text = "number of layers of each stage (default: balanced by FLOPs)"
    parser.add_argument("--layers-per-stage", metavar="L,L,…", help=text)
    text = "schedule that places stages on ranks (default 1f1b)"
    parser.add_argument("--schedule", default="1f1b", metavar="NAME", help=text)


_HEADINGS = {
    "stage": "stage",
    "ranks": "ranks",
    "layers": "layers",
    "contents": "contents",
    "parameters": "parameters",
    "flops_per_token": "GFLOP per token",
    "share_of_mean_flops": "% of mean",
}
_FORMATS: Formats = {
    "parameters": lambda count: f"{count * 1e-9:.3f} B",
    "flops_per_token": lambda flops: f"{flops * 1e-9:.4g}",
    "share_of_mean_flops": lambda share: f"{share * 100:.1f}",
}


def answer(options: argparse.Namespace) -> Answer:
    """Split the model that the options describe into stages, balanced by FLOPs unless their layers are given.

    FLOPs are per token, forward plus backward. Raises `ConfigError` for stages that the model or schedule cannot have.
    """
    config = compose_model_config(options.overrides, options.config_dir)
    model, length = config.model, config.training.sequence_length
    counts = None if options.layers_per_stage is None else _parse_layout(options.layers_per_stage)
    problems = partition_problems(model.num_hidden_layers, options.stages, counts)
    raise_if_any(replace(problem, field=f"--{problem.field.replace('_', '-')}") for problem in problems)
    placement = _placement(options.schedule, options.stages)
    split = split_layers(model, length, options.stages, counts)
    parts = count_part_costs(model, length)
    stages = [_stage(model, parts, placement, split, stage) for stage in range(options.stages)]
    data = {
        "model": model.name,
        "sequence_length": length,
        "layout": list(split.layers_per_stage),
        "imbalance": split.imbalance,
        "stages": stages,
        "convention": FLOP_CONVENTION,
    }
    title = f"{model.name} on {options.stages} stages, sequence length {length}"
    rows = [stage | _stage_texts(model, number, stage) for number, stage in enumerate(stages)]
    notes = (
        f"The largest stage is {100 * split.imbalance:.1f} % above the mean.",
        f"Layers per stage: {','.join(map(str, split.layers_per_stage))}",
        f"Convention: {FLOP_CONVENTION}.",
    )
    return Answer.from_blocks(title, data, [records_table(title, _HEADINGS, rows, _FORMATS), *map(Paragraph, notes)])


def _stage(
    model: ModelConfig, parts: ModelPartCosts, placement: StagePlacement, split: LayerPartition, stage: int
) -> dict[str, Any]:
    """Return the figures of a stage; the first has the embedding, the last head and MTP modules."""
    layers, costs, depth = split.layer_ranges[stage], split.stage_costs, model.num_nextn_predict_layers
    others = {"embedding": parts.embedding.parameters} if stage == 0 else {}
    if stage == placement.num_stages - 1:
        others["head"] = parts.head.parameters
        if depth:
            others["MTP" if depth == 1 else f"{depth} MTP modules"] = parts.mtp.parameters
        if depth and not placement.first_and_last_stage_colocated():  # MTP embeds tokens too
            others["embedding replica"] = parts.embedding.parameters
    return {
        "ranks": [place.rank for place in placement.locations_of_stage(stage)],
        "layers": list(layers),
        "non_layer_modules": list(others),
        "parameters": sum(parts.layers[layer].parameters for layer in layers) + sum(others.values()),
        "flops_per_token": costs[stage],
        "share_of_mean_flops": costs[stage] * len(costs) / sum(costs),
    }


def _stage_texts(model: ModelConfig, number: int, stage: Mapping[str, Any]) -> dict[str, str]:
    layers = stage["layers"]
    dense = sum(layer < model.first_k_dense_replace for layer in layers)
    kinds = [f"{count} {kind}" for count, kind in ((dense, "dense"), (len(layers) - dense, "MoE")) if count]
    return {
        "stage": str(number),
        "ranks": ", ".join(map(str, stage["ranks"])),
        "layers": f"{layers[0]}–{layers[-1]}" if len(layers) > 1 else str(layers[0]),
        "contents": ", ".join(kinds + stage["non_layer_modules"]),
    }


def _parse_layout(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(item) for item in text.split(","))
    except ValueError:
        hint = "must be the number of layers of each stage, as in 4,4,4,3"
        raise ConfigError([Problem("--layers-per-stage", text, hint)]) from None


def _placement(schedule: str, stages: int) -> StagePlacement:
    """Return the ranks of `stages` by `schedule`. Raises `ConfigError` for a number of stages it cannot have."""
    if schedule not in (names := [each.name for each in SCHEDULES]):
        raise ConfigError([Problem("--schedule", schedule, f"unknown; must be one of {', '.join(names)}")])
    per_rank = build_placement(schedule, ranks=1).num_stages
    if stages % per_rank:
        below = stages // per_rank * per_rank
        hint = f"{schedule} has {per_rank} stages per rank: nearest {below} or {below + per_rank}"
        raise ConfigError([Problem("--stages", stages, hint)])
    ranks = stages // per_rank
    demands = (p for p in schedule_problems(schedule, ranks, micro_batches=2 * ranks) if p.field == "ranks")
    raise_if_any(Problem("--stages", stages, problem.hint) for problem in demands)
    return build_placement(schedule, ranks)
