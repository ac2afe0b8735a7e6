"""Exposed time of the end of a step: gradient reduce-scatter, optimizer, weight all-gather.

A stage's gradients are reduced after the last instruction that adds to them, and its weights are gathered until the
next step's first instruction that reads them (`parallelism/zero/`). A rank's collectives run one after the other; the
model assumes that they and the exchanges do not slow each other down.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...comm.errors import ConfigError, Problem
from ...comm.topology import Topology
from ...parallelism.pipeline.chunk_walk import StageShape
from ...parallelism.pipeline.liveness import first_use, last_use
from ...parallelism.pipeline.program import PipelineProgram
from ...parallelism.pipeline.simulate import SimulatedTimes
from ...trainer.costs.cluster import ClusterConfig
from ...trainer.costs.parameters import count_model_parts
from ...trainer.model.config import ModelConfig
from .exchange_time import bytes_per_second
from .kernel_times import KernelTable
from .recipe import ForecastRecipe, GemmPrecision

GRADIENT_BYTES = 4
"""Bytes of a gradient: FP32."""


@dataclass(frozen=True)
class RankParameters:
    """Parameters of one rank: dense ones are replicated over data-parallel ranks, experts over expert replicas."""

    dense: float
    routed: float
    dense_replicas: int
    """Ranks over which the optimizer state of the dense part is sharded."""
    routed_replicas: int

    @staticmethod
    def of_stages(model: ModelConfig, topology: Topology, copies: int, held: Sequence[StageShape]) -> "RankParameters":
        """Count the parameters of a rank that holds the stages `held`; `copies` pipeline ranks hold each stage."""
        parts = count_model_parts(model)
        is_first, is_last = any(stage.is_first for stage in held), any(stage.is_last for stage in held)
        # An MTP module shares embedding and head with the main model (report §2.2), so the last stage needs both.
        counts = (
            (parts.dense_layer, sum(stage.dense_layers for stage in held)),
            (parts.moe_layer, sum(stage.moe_layers for stage in held)),
            (parts.embedding, is_first or (is_last and model.num_nextn_predict_layers > 0)),
            (parts.head, is_last),
            (parts.mtp, is_last),
        )
        dense = sum(part.dense * count for part, count in counts)
        routed = sum(part.routed * count for part, count in counts) / topology.ep
        return RankParameters(dense, routed, topology.dp * copies, topology.edp * copies)


@dataclass(frozen=True)
class WeightLiveness:
    """Indices of the first and last instructions that use the weights of each stage, on each of its ranks."""

    first_use_by_stage: tuple[dict[int, int], ...]
    """One mapping per stage: rank to instruction index."""
    last_use_by_stage: tuple[dict[int, int], ...]

    @staticmethod
    def from_program(program: PipelineProgram) -> "WeightLiveness":
        """Derive the indices from the program, as the runtime does."""
        holders = [
            sorted({place.rank for place in program.placement.locations_of_stage(stage)})
            for stage in range(program.placement.num_stages)
        ]
        return WeightLiveness(
            tuple({rank: first_use(program, rank, [stage]) for rank in ranks} for stage, ranks in enumerate(holders)),
            tuple({rank: last_use(program, rank, [stage]) for rank in ranks} for stage, ranks in enumerate(holders)),
        )


@dataclass(frozen=True)
class OptimizerStepTimeModel:
    """Times of the optimizer step in one layout."""

    cluster: ClusterConfig
    recipe: ForecastRecipe
    table: KernelTable
    topology: Topology

    @property
    def is_measured(self) -> bool:
        """True if the table has the whole update per thousand parameters, as `shoestring calibrate` times it."""
        return self.table.find_row("phase", "optimizer", "any") is not None

    def measured_sum_seconds(self, held: RankParameters) -> float:
        """Return the seconds of one rank's gradient sums as calibrated; a CPU process overlaps them with nothing."""
        copied = held.dense * (held.dense_replicas > 1) + held.routed * (held.routed_replicas > 1)
        return copied / 1e3 * self._timed_row("reduce")

    def _timed_row(self, name: str) -> float:
        row = self.table.find_row("phase", name, "any")
        if row is None:
            raise ConfigError([Problem("cluster.tables", self.table.name, f"has no phase {name}; calibrate again")])
        return row.seconds

    def optimizer_seconds(self, held: RankParameters) -> float:
        """Return the seconds of one rank's update, as calibrated or from the bytes that it moves of its shard."""
        if self.is_measured:
            return (held.dense + held.routed) / 1e3 * self._timed_row("optimizer") + self._timed_row("step")
        wide = self.recipe.high_precision_bytes
        shard = held.dense / held.dense_replicas + held.routed / held.routed_replicas
        # A pure memory pass: read the gradient for the norm and again for the update, read and write the FP32 master
        # (8 bytes) and both moments, write the weight.
        touched = shard * (2 * GRADIENT_BYTES + 8 + 2 * self.recipe.moment_bytes + wide)
        if self.recipe.precision is GemmPrecision.FP8:
            # Quantizing reads BF16 (2 bytes) and writes both FP8 layouts (1 each), of all weights and not the shard.
            touched += (held.dense + held.routed) * 4
        share = self.table.find_row("memory", "update", "any")
        rate = bytes_per_second(self.cluster, "memory", "the optimizer's update")
        return touched / (rate * (share.value if share is not None else 1.0))

    def collective_seconds(self, held: RankParameters, size: int) -> float:
        """Return the seconds in which the `size` bytes per parameter of one stage are reduced or gathered."""
        topology, per_node = self.topology, self.topology.gpus_per_node
        dense = self._collective(held.dense * size, held.dense_replicas, min(topology.dp, per_node))
        # Replicas of an expert are `ep` ranks apart: at V3's EP64 each is on another node, and only InfiniBand counts.
        neighbors = max(1, min(topology.edp, per_node // topology.ep))
        return dense + self._collective(held.routed * size, held.routed_replicas, neighbors)

    def _collective(self, count: float, ranks: int, inside: int) -> float:
        """Return the seconds of a reduce-scatter or all-gather of `count` bytes over `ranks`, `inside` per node."""
        if ranks == 1 or not count:
            return 0.0
        nodes, need, seconds = max(1, ranks // inside), f"a sum over {ranks} replicas", []
        if inside > 1:
            seconds.append(count * (inside - 1) / inside / bytes_per_second(self.cluster, "nvlink", need))
        if nodes > 1:
            seconds.append(count * (nodes - 1) / nodes / inside / bytes_per_second(self.cluster, "infiniband", need))
        # Rings inside nodes and between them run at the same time, so the slower one counts.
        return max(seconds) / self.recipe.link_speed_factor


def exposed_reduce_scatter_seconds(uses: WeightLiveness, times: SimulatedTimes, seconds: Sequence[float]) -> float:
    """Return the time from the last instruction until all gradients are reduced; `seconds` are of each stage."""
    # All ranks must start their collectives in one order, or they deadlock: that of the stages' last uses.
    order = sorted(range(len(seconds)), key=lambda stage: (max(uses.last_use_by_stage[stage].values()), stage))
    ready = [{rank: times.end_times[rank][index] for rank, index in ends.items()} for ends in uses.last_use_by_stage]
    ends = _one_by_one(order, ready, seconds, len(times.end_times))
    return max(0.0, max(end for _, end in ends) - times.makespan)


def exposed_all_gather_seconds(uses: WeightLiveness, times: SimulatedTimes, seconds: Sequence[float]) -> float:
    """Return how long the next step waits for weights, on the rank that waits longest; `seconds` are of each stage."""
    order = sorted(range(len(seconds)), key=lambda stage: (min(uses.first_use_by_stage[stage].values()), stage))
    ready = [dict.fromkeys(firsts, 0.0) for firsts in uses.first_use_by_stage]
    ends = _one_by_one(order, ready, seconds, len(times.end_times))
    return max(
        end - times.start_times[rank][index]
        for stage, end in ends
        for rank, index in uses.first_use_by_stage[stage].items()
    )


def _one_by_one(
    order: Sequence[int], ready: Sequence[dict[int, float]], seconds: Sequence[float], ranks: int
) -> Iterator[tuple[int, float]]:
    """Yield (stage, end of its collective), which begins when its input is ready and its ranks are free."""
    free = [0.0] * ranks
    for stage in order:
        end = max(max(free[rank], moment) for rank, moment in ready[stage].items()) + seconds[stage]
        for rank in ready[stage]:
            free[rank] = end
        yield stage, end
