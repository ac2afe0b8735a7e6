"""`shoestring partition`: a model's layers on the stages of a pipeline, and what each stage then weighs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table

from ...comm.errors import ConfigError, Problem, refuse_if_any
from ...parallelism.pipeline.partition import Partition, partition_problems
from ...parallelism.pipeline.placement import Placement
from ...parallelism.pipeline.schedules.registry import SCHEDULES, build_placement, schedule_problems
from ...trainer.config import RunConfig
from ...trainer.costs.flops import CONVENTION
from ...trainer.costs.parts import ModelParts, model_parts
from ...trainer.model.stage_layout import split_layers
from .params import compose_model


@dataclass(frozen=True)
class PartitionedModel:
    """A model on the stages of a pipeline."""

    config: RunConfig
    parts: ModelParts
    placement: Placement
    split: Partition
    """Balanced by FLOPs unless a layout was given. The embedding is on the first stage, head and MTP on the last."""

    @property
    def replica(self) -> bool:
        """Whether the last stage holds an embedding of its own, for MTP: not if the first is on the same rank."""
        return self.config.model.num_nextn_predict_layers > 0 and not self.placement.shares_ends()

    def parameters(self, stage: int) -> int:
        """What the stage holds, its embedding replica included."""
        count = sum(self.parts.layers[layer].parameters for layer in self.split.ranges[stage])
        if stage == 0:
            count += self.parts.embedding.parameters
        if stage == self.placement.stages - 1:
            count += self.parts.last.parameters + (self.parts.embedding.parameters if self.replica else 0)
        return count

    def ranks(self, stage: int) -> list[int]:
        """The ranks that hold the stage."""
        return [place.rank for place in self.placement.holders(stage)]

    def dense(self, stage: int) -> int:
        """How many of the stage's layers have a dense feed-forward network."""
        return sum(layer < self.config.model.first_k_dense_replace for layer in self.split.ranges[stage])

    def extras(self, stage: int) -> list[str]:
        """What the stage holds besides layers."""
        extras = ["embedding"] if stage == 0 else []
        if stage == self.placement.stages - 1:
            extras.append("head")
            if depth := self.config.model.num_nextn_predict_layers:
                extras.append("MTP" if depth == 1 else f"{depth} MTP modules")
            if self.replica:
                extras.append("embedding replica")
        return extras


def partition_model(
    overrides: Sequence[str], config_dir: Path | None, stages: int, schedule: str, layout: str | None
) -> PartitionedModel:
    """Split the model that `overrides` describe over `stages`, which `schedule` puts on ranks."""
    config = compose_model(overrides, config_dir)
    counts = None if layout is None else _parse_layout(layout)
    problems = partition_problems(config.model.num_hidden_layers, stages, counts)
    refuse_if_any(replace(problem, field=f"--{problem.field}") for problem in problems)
    placement = _placement(schedule, stages)
    length = config.training.sequence_length
    split = split_layers(config.model, length, stages, counts)
    return PartitionedModel(config, model_parts(config.model, length), placement, split)


def partition_tree(model: PartitionedModel) -> dict[str, object]:
    """The figures as plain values."""
    return {
        "model": model.config.model.name,
        "sequence_length": model.config.training.sequence_length,
        "layout": list(model.split.layers),
        "imbalance": model.split.imbalance,
        "stages": [
            {
                "ranks": model.ranks(stage),
                "layers": list(model.split.ranges[stage]),
                "extras": model.extras(stage),
                "parameters": model.parameters(stage),
                "flops_per_token": model.split.costs[stage],
            }
            for stage in range(model.placement.stages)
        ],
        "convention": CONVENTION,
    }


def partition_table(model: PartitionedModel) -> RenderableType:
    """The same for a reader."""
    costs, stages = model.split.costs, model.placement.stages
    mean = sum(costs) / stages
    name, length = model.config.model.name, model.config.training.sequence_length
    table = Table(title=f"{name} on {stages} stages, sequence length {length}", title_justify="left")
    for heading in ("stage", "ranks", "layers", "what they are", "parameters", "GFLOP a token", "of the mean"):
        table.add_column(heading, justify="left" if heading == "what they are" else "right")
    for stage, layers in enumerate(model.split.ranges):
        dense = model.dense(stage)
        kinds = [f"{count} {kind}" for count, kind in ((dense, "dense"), (len(layers) - dense, "MoE")) if count]
        table.add_row(
            str(stage),
            ", ".join(map(str, model.ranks(stage))),
            f"{layers[0]}–{layers[-1]}" if len(layers) > 1 else str(layers[0]),
            ", ".join(kinds + model.extras(stage)),
            f"{model.parameters(stage) / 1e9:.3f} B",
            f"{costs[stage] / 1e9:.4g}",
            f"{100 * costs[stage] / mean:.1f} %",
        )
    layout = ",".join(map(str, model.split.layers))
    largest = f"The largest stage is {100 * model.split.imbalance:.1f} % above the mean."
    return Group(table, largest, f"Layout: {layout}", f"Convention: {CONVENTION}.")


def _parse_layout(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(item) for item in text.split(","))
    except ValueError:
        hint = "write the number of layers of each stage, as in 4,4,4,3"
        raise ConfigError([Problem("--layout", text, hint)]) from None


def _placement(schedule: str, stages: int) -> Placement:
    """Where `schedule` puts `stages`; refused where they do not come out even."""
    if schedule not in (names := [each.name for each in SCHEDULES]):
        raise ConfigError([Problem("--schedule", schedule, f"no such schedule; there are {', '.join(names)}")])
    one_rank = build_placement(schedule, ranks=1).stages
    if stages % one_rank:
        below = stages // one_rank * one_rank
        hint = f"{schedule} has {one_rank} stages a rank: nearest {below} or {below + one_rank}"
        raise ConfigError([Problem("--stages", stages, hint)])
    ranks = stages // one_rank
    demands = (p for p in schedule_problems(schedule, ranks, micro_batches=2 * ranks) if p.field == "ranks")
    refuse_if_any(Problem("--stages", stages, problem.hint) for problem in demands)
    return build_placement(schedule, ranks)
