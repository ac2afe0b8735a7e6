"""Which rank of a pipeline holds which part of the model, and which ranks hold the same part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...comm.topology import Topology
from ...parallelism.pipeline.check import check
from ...parallelism.pipeline.partition import Partition, partition
from ...parallelism.pipeline.placement import Placement, Route, StagePlace
from ...parallelism.pipeline.program import Program
from ...parallelism.pipeline.schedules.registry import build_placement, build_program
from ..costs.parts import model_parts
from .config import ModelConfig
from .model import ModelShard
from .tape import StageSpec


@dataclass(frozen=True)
class Stages:
    """The layers of a model, split into the stages of a placement."""

    model: ModelConfig
    schedule: str
    placement: Placement
    layers: tuple[range, ...]
    """Of each stage."""

    @staticmethod
    def of(
        model: ModelConfig,
        sequence_length: int,
        schedule: str = "one_f_one_b",
        ranks: int = 1,
        chunks: int | None = None,
        layout: Sequence[int] | None = None,
    ) -> Stages:
        """Balanced by FLOPs, unless `layout` says how many layers each stage holds; the numbers must be legal."""
        placement = build_placement(schedule, ranks, chunks)
        return Stages(model, schedule, placement, split_layers(model, sequence_length, placement.stages, layout).ranges)

    def program(self, micro_batches: int) -> Program:
        """One global batch of so many micro-batches, proved to be right."""
        free = self.placement.route is Route.LOOP and self.placement.chunks > 1
        chunks = self.placement.chunks if free else None
        program = build_program(self.schedule, self.placement.ranks, micro_batches, chunks)
        check(program)
        return program

    def chunks(self, pp_rank: int) -> tuple[StageSpec, ...]:
        """The stages of one pipeline rank, by chunk."""
        places = (StagePlace(pp_rank, chunk) for chunk in range(self.placement.chunks))
        return tuple(
            StageSpec(self.layers[self.placement.stage(p)], self.placement.is_first(p), self.placement.is_last(p))
            for p in places
        )

    def share(self, topology: Topology, rank: int) -> ModelShard:
        """The part of the model that `rank` holds. The last stage has MTP modules, which embed tokens, too."""
        chunks = self.chunks(topology.pp_rank(rank))
        is_last = any(stage.is_last for stage in chunks)
        embeds_again = is_last and self.model.num_nextn_predict_layers > 0
        return ModelShard(
            layers=tuple(sorted(layer for stage in chunks for layer in stage.layers)),
            embedding=embeds_again or any(stage.is_first for stage in chunks),
            head=is_last,
            expert_ranks=topology.ep,
            expert_rank=topology.ep_rank(rank),
        )

    def users(self, parameter: str) -> tuple[int, ...]:
        """The stages that compute with the parameter of this name, ascending."""
        last = self.placement.stages - 1
        top, *rest = parameter.split(".")
        if top == "layers":
            return (next(number for number, layers in enumerate(self.layers) if int(rest[0]) in layers),)
        if top == "embedding":
            return tuple(sorted({0, last})) if self.model.num_nextn_predict_layers else (0,)
        return (last,)

    def holders(self, parameter: str) -> tuple[int, ...]:
        """The pipeline ranks that hold the parameter of this name, ascending."""
        return tuple(sorted({rank for stage in self.users(parameter) for rank in self._ranks_of(stage)}))

    def all_holders(self) -> Iterator[tuple[int, ...]]:
        """Every set of pipeline ranks that hold something in common."""
        yield from (self._ranks_of(stage) for stage in range(self.placement.stages))
        yield self.holders("embedding.weight")

    def _ranks_of(self, stage: int) -> tuple[int, ...]:
        return tuple(sorted({place.rank for place in self.placement.holders(stage)}))


def split_layers(
    model: ModelConfig, sequence_length: int, stages: int, layout: Sequence[int] | None = None
) -> Partition:
    """The main model's layers over so many stages; embedding at their beginning, head and MTP at their end."""
    parts = model_parts(model, sequence_length)
    costs = [layer.flops for layer in parts.layers]
    return partition(costs, stages, first=parts.embedding.flops, last=parts.last.flops, layout=layout)
