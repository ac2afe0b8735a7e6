"""`shoestring partition`: layers, parameters and FLOPs of each pipeline stage."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...comm.errors import ConfigError, Problem, raise_if_any
from ...parallelism.pipeline.partition import LayerPartition, partition_problems
from ...parallelism.pipeline.placement import StagePlacement
from ...parallelism.pipeline.schedules.registry import SCHEDULES, build_placement, schedule_problems
from ...trainer.config import RunConfig
from ...trainer.costs.flops import FLOP_CONVENTION, ModelPartCosts, count_part_costs
from ...trainer.model.stage_layout import split_layers
from ..answers.blocks import Answer, Cell, Paragraph, number, table
from ..answers.options import add_answer_options, add_override_arguments, print_answer
from .params import compose_model_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    add_override_arguments(parser)
    parser.add_argument("--stages", type=int, required=True, metavar="N", help="number of pipeline stages")
    text = "number of layers of each stage (default: balanced by FLOPs)"
    parser.add_argument("--layers-per-stage", metavar="L,L,…", help=text)
    text = "schedule that places stages on ranks (default 1f1b)"
    parser.add_argument("--schedule", default="1f1b", metavar="NAME", help=text)
    add_answer_options(parser)


def run(options: argparse.Namespace) -> int:
    """Print the stages of the model that the options describe."""
    size = options.stages, options.schedule, options.layers_per_stage
    return print_answer(options, partition_answer(partition_model(options.overrides, options.config_dir, *size)))


@dataclass(frozen=True)
class PartitionedModel:
    """A model split into pipeline stages."""

    config: RunConfig
    part_costs: ModelPartCosts
    placement: StagePlacement
    partition: LayerPartition
    """Partition, balanced by FLOPs unless it was given; embedding on the first stage, head and MTP on the last."""

    @property
    def has_embedding_replica(self) -> bool:
        """True if the last stage needs a copy of the embedding for MTP: not if the first stage is on the same rank."""
        return self.config.model.num_nextn_predict_layers > 0 and not self.placement.first_and_last_stage_colocated()

    def stage_parameters(self, stage: int) -> int:
        """Return the parameters of the stage, its embedding replica included."""
        count = sum(self.part_costs.layers[layer].parameters for layer in self.partition.layer_ranges[stage])
        if stage == 0:
            count += self.part_costs.embedding.parameters
        if stage == self.placement.num_stages - 1:
            count += self.part_costs.last_stage_extra.parameters + (
                self.part_costs.embedding.parameters if self.has_embedding_replica else 0
            )
        return count

    def stage_ranks(self, stage: int) -> list[int]:
        """Return the ranks that hold the stage."""
        return [place.rank for place in self.placement.locations_of_stage(stage)]

    def num_dense_layers(self, stage: int) -> int:
        """Return the number of the stage's dense layers."""
        return sum(layer < self.config.model.first_k_dense_replace for layer in self.partition.layer_ranges[stage])

    def non_layer_modules(self, stage: int) -> list[str]:
        """Return the names of the stage's modules that are not layers."""
        extras = ["embedding"] if stage == 0 else []
        if stage == self.placement.num_stages - 1:
            extras.append("head")
            if depth := self.config.model.num_nextn_predict_layers:
                extras.append("MTP" if depth == 1 else f"{depth} MTP modules")
            if self.has_embedding_replica:
                extras.append("embedding replica")
        return extras


def partition_model(
    overrides: Sequence[str], config_dir: Path | None, stages: int, schedule: str, layout: str | None
) -> PartitionedModel:
    """Split the model that `overrides` describe into `stages`, placed on ranks by `schedule`."""
    config = compose_model_config(overrides, config_dir)
    counts = None if layout is None else _parse_layout(layout)
    problems = partition_problems(config.model.num_hidden_layers, stages, counts)
    raise_if_any(replace(problem, field=f"--{problem.field.replace('_', '-')}") for problem in problems)
    placement = _placement(schedule, stages)
    length = config.training.sequence_length
    split = split_layers(config.model, length, stages, counts)
    return PartitionedModel(config, count_part_costs(config.model, length), placement, split)


def partition_answer(model: PartitionedModel) -> Answer:
    """Return the stages; FLOPs are per token, forward plus backward."""
    costs, name, length = model.partition.stage_costs, model.config.model.name, model.config.training.sequence_length
    stages = [
        {
            "ranks": model.stage_ranks(stage),
            "layers": list(layers),
            "non_layer_modules": model.non_layer_modules(stage),
            "parameters": model.stage_parameters(stage),
            "flops_per_token": costs[stage],
            "share_of_mean_flops": costs[stage] * len(costs) / sum(costs),
        }
        for stage, layers in enumerate(model.partition.layer_ranges)
    ]
    data = {
        "model": name,
        "sequence_length": length,
        "layout": list(model.partition.layers_per_stage),
        "imbalance": model.partition.imbalance,
        "stages": stages,
        "convention": FLOP_CONVENTION,
    }
    title = f"{name} on {len(costs)} stages, sequence length {length}"
    headings = ("stage", "ranks", "layers", "contents", "parameters", "GFLOP per token", "% of mean")
    rows = [_row(model, stage) for stage in range(len(costs))]
    notes = (
        f"The largest stage is {100 * model.partition.imbalance:.1f} % above the mean.",
        f"Layers per stage: {','.join(map(str, model.partition.layers_per_stage))}",
        f"Convention: {FLOP_CONVENTION}.",
    )
    return Answer.from_blocks(title, data, [table(title, headings, rows), *map(Paragraph, notes)])


def _row(model: PartitionedModel, stage: int) -> list[Cell]:
    costs, layers, dense = (
        model.partition.stage_costs,
        model.partition.layer_ranges[stage],
        model.num_dense_layers(stage),
    )
    kinds = [f"{count} {kind}" for count, kind in ((dense, "dense"), (len(layers) - dense, "MoE")) if count]
    return [
        str(stage),
        ", ".join(map(str, model.stage_ranks(stage))),
        f"{layers[0]}–{layers[-1]}" if len(layers) > 1 else str(layers[0]),
        ", ".join(kinds + model.non_layer_modules(stage)),
        number(model.stage_parameters(stage), ".3f", " B", scale=1e-9),
        number(costs[stage], ".4g", scale=1e-9),
        number(costs[stage] * len(costs) / sum(costs), ".1f", scale=100),
    ]


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
