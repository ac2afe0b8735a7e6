"""Assignment of the model's layers to pipeline stages and ranks, and the ranks that share a parameter."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...comm.topology import Topology
from ...parallelism.pipeline.check import verify_program
from ...parallelism.pipeline.partition import LayerPartition, partition_layers
from ...parallelism.pipeline.placement import PlacementStyle, StageLocation, StagePlacement
from ...parallelism.pipeline.program import PipelineProgram
from ...parallelism.pipeline.schedules.registry import build_placement, build_program
from ..costs.flops import count_part_costs
from .config import ModelConfig
from .forward_context import StageSpec
from .model import ModelShard


@dataclass(frozen=True)
class StageLayout:
    """Layers of a model, split into the stages of a placement."""

    model: ModelConfig
    schedule: str
    placement: StagePlacement
    stage_layers: tuple[range, ...]
    """Layers of each stage."""

    @staticmethod
    def build(
        model: ModelConfig,
        sequence_length: int,
        schedule: str = "1f1b",
        ranks: int = 1,
        chunks: int | None = None,
        layout: Sequence[int] | None = None,
    ) -> "StageLayout":
        """Split the layers by FLOPs, or as `layout` gives the layers per stage; the numbers must be valid."""
        placement = build_placement(schedule, ranks, chunks)
        return StageLayout(
            model, schedule, placement, split_layers(model, sequence_length, placement.num_stages, layout).layer_ranges
        )

    def build_checked_program(self, micro_batches: int) -> PipelineProgram:
        """Build the program of a step of `micro_batches` micro-batches, and verify it."""
        free = self.placement.style is PlacementStyle.LOOP and self.placement.chunks_per_rank > 1
        chunks = self.placement.chunks_per_rank if free else None
        program = build_program(self.schedule, self.placement.ranks, micro_batches, chunks)
        verify_program(program)
        return program

    def stages_of_rank(self, pp_rank: int) -> tuple[StageSpec, ...]:
        """Return the stages of one pipeline rank, by chunk."""
        places = (StageLocation(pp_rank, chunk) for chunk in range(self.placement.chunks_per_rank))
        return tuple(
            StageSpec(
                self.stage_layers[self.placement.stage_at(p)],
                self.placement.is_first_stage(p),
                self.placement.is_last_stage(p),
            )
            for p in places
        )

    def model_shard(self, topology: Topology, rank: int) -> ModelShard:
        """Return the part of the model that `rank` holds; the last stage holds the MTP modules."""
        chunks = self.stages_of_rank(topology.pp_rank(rank))
        is_last = any(stage.is_last for stage in chunks)
        # MTP modules embed tokens too, so the last stage also holds the embedding (see `replica_pp_groups`).
        embeds_again = is_last and self.model.num_nextn_predict_layers > 0
        return ModelShard(
            layers=tuple(sorted(layer for stage in chunks for layer in stage.layers)),
            has_embedding=embeds_again or any(stage.is_first for stage in chunks),
            has_head=is_last,
            ep_size=topology.ep,
            ep_rank=topology.ep_rank(rank),
        )

    def stages_using(self, parameter: str) -> tuple[int, ...]:
        """Return the stages that use the parameter of this name, ascending."""
        last = self.placement.num_stages - 1
        top, *rest = parameter.split(".")
        if top == "layers":
            return (next(number for number, layers in enumerate(self.stage_layers) if int(rest[0]) in layers),)
        if top == "embedding":
            return tuple(sorted({0, last})) if self.model.num_nextn_predict_layers else (0,)
        return (last,)

    def pp_ranks_holding(self, parameter: str) -> tuple[int, ...]:
        """Return the pipeline ranks that hold the parameter of this name, ascending."""
        return tuple(sorted({rank for stage in self.stages_using(parameter) for rank in self._ranks_of(stage)}))

    def replica_pp_groups(self) -> Iterator[tuple[int, ...]]:
        """Yield every set of pipeline ranks that hold a parameter in common; one process group is needed for each."""
        yield from (self._ranks_of(stage) for stage in range(self.placement.num_stages))
        yield self.pp_ranks_holding("embedding.weight")

    def _ranks_of(self, stage: int) -> tuple[int, ...]:
        return tuple(sorted({place.rank for place in self.placement.locations_of_stage(stage)}))


def split_layers(
    model: ModelConfig, sequence_length: int, stages: int, layout: Sequence[int] | None = None
) -> LayerPartition:
    """Split the main model's layers over `stages` stages; the first also has the embedding, the last head and MTP."""
    parts = count_part_costs(model, sequence_length)
    costs = [layer.flops for layer in parts.layers]
    return partition_layers(
        costs,
        stages,
        first_stage_extra=parts.embedding.flops,
        last_stage_extra=parts.last_stage_extra.flops,
        layers_per_stage=layout,
    )
