"""Forecast of one optimizer step of one layout: the runtime's program simulated, with each rank's time by term."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial

from ...comm.topology import LinkType, Topology
from ...comm.trace import GRADIENT_SYNC_WAIT, OPTIMIZER, PIPELINE_WAIT
from ...parallelism.pipeline.chunk_walk import StageShape
from ...parallelism.pipeline.communication import derive_p2p_batches
from ...parallelism.pipeline.liveness import LiveInstruction, peak_instructions
from ...parallelism.pipeline.program import Op, PipelineProgram
from ...parallelism.pipeline.schedules.registry import build_program
from ...parallelism.pipeline.simulate import ProgramSimulator, SimulatedTimes, ideal_bubble_time
from ...trainer.costs.cluster import ClusterConfig
from ...trainer.costs.flops import FlopCount, count_flops
from ...trainer.ledger.terms import to_paper_terms
from ...trainer.memory.layout import LayoutMemory, ShardedParameters, stage_shapes, stage_shapes_by_pp_rank
from ...trainer.memory.peak import RankMemory
from ...trainer.model.config import ModelConfig
from ...trainer.model.stage_layout import StageLayout
from .compute_time import ComputeTimeModel
from .exchange_time import ExchangeTimeModel, bytes_per_second
from .instruction_times import InstructionCounts, InstructionTimes
from .kernel_times import EvidenceCoverage
from .layout_memory import workspace_from_shape
from .operations import LayerWorkload
from .optimizer_step_time import (
    GRADIENT_BYTES,
    OptimizerStepTimeModel,
    RankParameters,
    WeightLiveness,
    exposed_all_gather_seconds,
    exposed_reduce_scatter_seconds,
)
from .recipe import ForecastRecipe, GemmPrecision
from .stream_simulation import ChunkTimeModel


@dataclass(frozen=True)
class ParallelLayout:
    """Parallel layout of a run: topology, pipeline schedule and partition."""

    topology: Topology
    schedule: str
    micro_batch_size: int = 1
    chunks_per_rank: int | None = None
    layers_per_stage: tuple[int, ...] | None = None
    """Layers of each stage; None: balanced by FLOPs, as the runtime does."""

    def num_micro_batches(self, global_batch: int) -> int:
        """Return the micro-batches of one rank per step."""
        return global_batch // (self.topology.dp * self.micro_batch_size)


@dataclass(frozen=True)
class StepForecast:
    """Forecast of one optimizer step. Seconds and bytes; tuples are by pipeline rank."""

    layout: ParallelLayout
    recipe: ForecastRecipe
    stage_shapes: tuple[StageShape, ...]
    program_times: SimulatedTimes
    time_terms_by_rank: tuple[dict[str, float], ...]
    """The ledger's terms (`trainer.ledger.terms.STEP_TIME_TERMS`) of each rank; each rank's add up to the step."""
    exposed_collective_seconds: float
    """Exposed seconds of gradient reduce-scatter and weight all-gather."""
    optimizer_seconds: float
    memory_by_rank: tuple[RankMemory, ...]
    flops_per_token: FlopCount
    global_batch_tokens: int
    """Tokens per step."""
    peak_flops_per_gpu: float
    """FLOP/s of one GPU that MFU is relative to."""
    p2p_seconds: float
    """Seconds of one P2P message between stages."""
    evidence_coverage: EvidenceCoverage

    @property
    def step_seconds(self) -> float:
        """Seconds per step."""
        return self.program_times.makespan + self.exposed_collective_seconds + self.optimizer_seconds

    @property
    def gpus(self) -> int:
        """Number of GPUs, one per rank."""
        return self.layout.topology.world_size

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Tokens per second of one GPU."""
        return self.global_batch_tokens / self.step_seconds / self.gpus

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization of the main model, causal, without MTP."""
        # The convention decides 4 to 17 %: the published 38.94 % gives 249.7 GFLOP per token, which is a causal count
        # without MTP (260.6 with it, 281.2 non-causal).
        return self.flops_per_token.main_model * self.tokens_per_second_per_gpu / self.peak_flops_per_gpu

    @property
    def peak_memory(self) -> RankMemory:
        """Memory of the rank that needs most."""
        return max(self.memory_by_rank, key=lambda memory: memory.total)

    @property
    def peak_bytes_with_fragmentation(self) -> float:
        """Bytes of the rank that needs most memory, fragmentation included."""
        return max(bytes_with_fragmentation(memory, self.recipe) for memory in self.memory_by_rank)

    def gpu_hours(self, tokens: float) -> float:
        """Return the GPU-hours of training on `tokens` at this throughput."""
        return tokens / self.tokens_per_second_per_gpu / 3600

    @cached_property
    def mean_time_terms(self) -> dict[str, float]:
        """Terms, mean over ranks."""
        return {
            name: sum(rank[name] for rank in self.time_terms_by_rank) / len(self.time_terms_by_rank)
            for name in self.time_terms_by_rank[0]
        }

    @cached_property
    def bubble_seconds(self) -> float:
        """Part of the mean pipeline_wait that the schedule causes even with equal stages, as in the ledger."""
        program = self.program_times.program
        counts = Counter(entry.op for row in program.instructions for entry in row)
        mean = {op: sum(self.instruction_seconds(op)) / counts[op] if counts[op] else 0.0 for op in Op}
        # The ideal bubble has every op at its mean duration; the rest comes from uneven stages and P2P messages.
        return min(self.mean_time_terms[PIPELINE_WAIT], ideal_bubble_time(program, mean) / program.ranks)

    def deepseek_report_terms(self) -> dict[str, float]:
        """Return the mean terms under the names of DeepSeek's report, as in the ledger."""
        return to_paper_terms(self.mean_time_terms, self.bubble_seconds)

    def instruction_seconds(self, op: Op) -> list[float]:
        """Return the seconds of all instructions of one op, by rank."""
        rows = self.program_times.timed_instructions
        return [sum(end - start for entry, start, end in row if entry.op is op) for row in rows]

    @property
    def bottleneck(self) -> str:
        """Largest part of the step besides computing, in words."""
        busy, waits = self.program_times.busy_time_per_rank, self.program_times.bubble_time_per_rank
        parts = {
            "pipeline bubble": sum(waits) / len(waits),
            "exposed all-to-alls": self.mean_time_terms["exposed_all_to_all"],
            "gradients and optimizer": self.exposed_collective_seconds + self.optimizer_seconds,
        }
        name = max(parts, key=lambda key: parts[key])
        uneven = max(busy) - sum(busy) / len(busy)
        detail = f" ({100 * uneven / self.step_seconds:.1f} % from uneven stages)" if name == "pipeline bubble" else ""
        return f"{name} {100 * parts[name] / self.step_seconds:.1f} %{detail}"


def _terms(
    runs: InstructionTimes, times: SimulatedTimes, reduce: float, optimizer: float
) -> Iterator[dict[str, float]]:
    for rank, (ends, busy) in enumerate(zip(times.end_times, times.busy_time_per_rank, strict=True)):
        # The gradient norm is a sum over all ranks: after its last instruction every rank waits for the slowest one.
        last = times.makespan - ends[-1] + reduce
        yield runs.time_terms(rank) | {PIPELINE_WAIT: ends[-1] - busy, GRADIENT_SYNC_WAIT: last, OPTIMIZER: optimizer}


def bytes_with_fragmentation(memory: RankMemory, recipe: ForecastRecipe) -> float:
    """Return the bytes that a rank needs, fragmentation included."""
    # Weights, gradients and optimizer state are flat buffers allocated once; only memory that is allocated and freed
    # within a step leaves gaps.
    return memory.total + recipe.fragmentation * memory.within_step


@dataclass(frozen=True)
class ForecastProgram:
    """Program of one step, and what the forecasts of all recipes derive from it, each once."""

    program: PipelineProgram

    @cached_property
    def simulator(self) -> ProgramSimulator:
        """Simulator of the program."""
        return ProgramSimulator(self.program)

    @cached_property
    def peak_instructions_by_rank(self) -> tuple[frozenset[LiveInstruction], ...]:
        """Instructions of each rank at which its memory may peak."""
        return tuple(peak_instructions(self.program, *each) for each in enumerate(derive_p2p_batches(self.program)))

    @cached_property
    def weight_liveness(self) -> WeightLiveness:
        """First and last uses of the weights of each stage."""
        return WeightLiveness.from_program(self.program)

    @cached_property
    def instruction_counts(self) -> InstructionCounts:
        """Number of instructions of each rank by op and chunks."""
        return [Counter(entry.op_and_chunks for entry in row) for row in self.program.instructions]


@cache
def _forecast_program(schedule: str, ranks: int, micro_batches: int, chunks: int | None) -> ForecastProgram:
    return ForecastProgram(build_program(schedule, ranks, micro_batches, chunks))


class StepForecaster:
    """Forecaster of steps of one model on one cluster."""

    # A search tries recipes and precisions of one schedule: each value is cached by what it depends on and by nothing
    # else, so that a program is built once for all of them.

    def __init__(self, model: ModelConfig, cluster: ClusterConfig, sequence_length: int) -> None:
        self.model, self.cluster, self.sequence_length = model, cluster, sequence_length
        self.flops_per_token = count_flops(model, sequence_length)
        self._stage_layout = cache(partial(StageLayout.build, model, sequence_length))
        self._parameters = cache(ShardedParameters)
        self._costs = cache(self._build_chunk_time_model)
        self.parameters_by_rank = cache(self._parameters_by_rank)

    def forecast(self, layout: ParallelLayout, recipe: ForecastRecipe, global_batch: int) -> StepForecast:
        """Simulate one step; layout and batch must be legal. Raises `ConfigError` where figures are missing."""
        costs, stages = self.chunk_time_model(layout, recipe), self.stage_shapes(layout)
        planned = self.step_program(layout, global_batch)
        held, factor = self._stages_by_rank(layout), self._slowest_node_factor(layout, recipe)
        runs = InstructionTimes(costs, held, planned.instruction_counts, recipe, factor)
        transfer = self.p2p_seconds(layout, recipe)
        times = planned.simulator.simulate(runs.duration, transfer)
        reduce = self._exposed_collective_seconds(layout, recipe, planned.weight_liveness, times)
        optimizer = self._optimizer_seconds(layout, recipe)
        peak = self.cluster.peak_tflops
        assert peak is not None
        return StepForecast(
            layout=layout,
            recipe=recipe,
            stage_shapes=stages,
            program_times=times,
            time_terms_by_rank=tuple(_terms(runs, times, reduce, optimizer)),
            exposed_collective_seconds=reduce,
            optimizer_seconds=optimizer,
            memory_by_rank=self.memory_by_rank(layout, recipe, global_batch),
            flops_per_token=self.flops_per_token,
            global_batch_tokens=global_batch * self.sequence_length,
            peak_flops_per_gpu=peak * 1e12,
            p2p_seconds=transfer,
            evidence_coverage=costs.compute_model.coverage,
        )

    def step_seconds_lower_bound(self, layout: ParallelLayout, recipe: ForecastRecipe, global_batch: int) -> float:
        """Return a lower bound of the step in any schedule: computing of the busiest rank plus the optimizer."""
        costs = self.chunk_time_model(layout, recipe)
        # DualPipe holds each stage on two ranks (its parameters are doubled), and each runs half of the micro-batches.
        count = layout.num_micro_batches(global_batch) / self._copies(layout)
        busy = [count * sum(map(costs.compute_seconds, stages)) for stages in self._stages_by_rank(layout)]
        longest = max(busy) if recipe.uneven_stages else sum(busy) / len(busy)
        return longest * self._slowest_node_factor(layout, recipe) + self._optimizer_seconds(layout, recipe)

    def memory_by_rank(
        self, layout: ParallelLayout, recipe: ForecastRecipe, global_batch: int
    ) -> tuple[RankMemory, ...]:
        """Return the memory of every pipeline rank."""
        memory = self._layout_memory(layout, recipe)
        worst_by_rank = self.step_program(layout, global_batch).peak_instructions_by_rank
        return tuple(memory.predict_rank(*each) for each in enumerate(worst_by_rank))

    def static_memory_bytes(self, layout: ParallelLayout, recipe: ForecastRecipe) -> float:
        """Return the bytes of weights, gradients and optimizer state of the rank with most."""
        memory = self._layout_memory(layout, recipe)
        return max(memory.state(pp_rank).total for pp_rank in range(layout.topology.pp))

    def step_program(self, layout: ParallelLayout, global_batch: int) -> ForecastProgram:
        """Return the program of one step."""
        micro_batches = layout.num_micro_batches(global_batch)
        return _forecast_program(layout.schedule, layout.topology.pp, micro_batches, layout.chunks_per_rank)

    def stages(self, layout: ParallelLayout) -> StageLayout:
        """Return the stages of a layout, by the runtime's partition."""
        return self._stage_layout(layout.schedule, layout.topology.pp, layout.chunks_per_rank, layout.layers_per_stage)

    def stage_shapes(self, layout: ParallelLayout) -> tuple[StageShape, ...]:
        """Return the contents of each stage."""
        return stage_shapes(self.stages(layout))

    def chunk_time_model(self, layout: ParallelLayout, recipe: ForecastRecipe) -> ChunkTimeModel:
        """Return the chunk time model of a layout and recipe."""
        return self._costs(recipe, layout.topology.ep, layout.micro_batch_size)

    def _build_chunk_time_model(self, recipe: ForecastRecipe, ep_size: int, micro_batch_size: int) -> ChunkTimeModel:
        cost = ComputeTimeModel.from_cluster(self.cluster, recipe)
        wire = ExchangeTimeModel(self.cluster, recipe, cost.table, cost.coverage)
        shape = LayerWorkload(self.model, self.sequence_length, micro_batch_size, ep_size, recipe.skew)
        return ChunkTimeModel(shape, cost, wire)

    def p2p_seconds(self, layout: ParallelLayout, recipe: ForecastRecipe) -> float:
        """Return the seconds of one P2P message: bytes over the slowest link between neighboring stages."""
        topology = layout.topology
        if topology.pp == 1 or not recipe.p2p_takes_time:
            return 0.0
        if recipe.p2p_seconds is not None:
            return recipe.p2p_seconds
        tokens = self.sequence_length * layout.micro_batch_size
        table = self.chunk_time_model(layout, recipe).compute_model.table
        measured = table.find_row("edge", "message", f"{layout.micro_batch_size}x{self.sequence_length}")
        if measured is not None:
            return measured.seconds
        # A chunk's output is one hidden state per token: 58.7 MB for V3, 1.5 ms at 40 GB/s. The slowest link counts,
        # since one late rank delays its whole expert-parallel group.
        links = {topology.link_type(rank, rank + topology.dp) for rank in range(topology.dp)}
        link = "infiniband" if LinkType.INFINIBAND in links else "nvlink"
        rate = bytes_per_second(self.cluster, link, "a P2P message between stages")
        return tokens * self.model.hidden_size * recipe.high_precision_bytes / (rate * recipe.link_speed_factor)

    def _exposed_collective_seconds(
        self, layout: ParallelLayout, recipe: ForecastRecipe, uses: WeightLiveness, times: SimulatedTimes
    ) -> float:
        step_model = self._optimizer_step_model(layout, recipe)
        if step_model.is_measured:
            return max(map(step_model.measured_sum_seconds, self.parameters_by_rank(layout)))
        stages = list(self._parameters_of_collectives(layout))
        reduce = [step_model.collective_seconds(held, GRADIENT_BYTES) for held in stages]
        gather = [step_model.collective_seconds(held, recipe.high_precision_bytes) for held in stages]
        return exposed_reduce_scatter_seconds(uses, times, reduce) + exposed_all_gather_seconds(uses, times, gather)

    def _optimizer_seconds(self, layout: ParallelLayout, recipe: ForecastRecipe) -> float:
        """Return the optimizer's seconds on the slowest rank."""
        return max(map(self._optimizer_step_model(layout, recipe).optimizer_seconds, self.parameters_by_rank(layout)))

    def _optimizer_step_model(self, layout: ParallelLayout, recipe: ForecastRecipe) -> OptimizerStepTimeModel:
        return OptimizerStepTimeModel(
            self.cluster, recipe, self.chunk_time_model(layout, recipe).compute_model.table, layout.topology
        )

    def _parameters_of_collectives(self, layout: ParallelLayout) -> Iterator[RankParameters]:
        """Yield the parameters that the collectives of each stage contain."""
        together = any(held[0].is_first and held[-1].is_last for held in self._stages_by_rank(layout))
        has_replica = bool(together and self.model.num_nextn_predict_layers)
        embedding = self.model.vocab_size * self.model.hidden_size
        for stage in self.stage_shapes(layout):
            held = self._rank_parameters(layout, [stage])
            # MTP embeds tokens in the last stage. Where one rank holds the first and the last stage, as in DualPipe,
            # they share the embedding (report §3.2.3), and the first stage's collectives contain it.
            spare = embedding if stage.is_last and not stage.is_first and has_replica else 0
            yield replace(held, dense=held.dense - spare)

    def _parameters_by_rank(self, layout: ParallelLayout) -> tuple[RankParameters, ...]:
        return tuple(self._rank_parameters(layout, held) for held in self._stages_by_rank(layout))

    def _rank_parameters(self, layout: ParallelLayout, held: Sequence[StageShape]) -> RankParameters:
        return RankParameters.of_stages(self.model, layout.topology, self._copies(layout), held)

    def _copies(self, layout: ParallelLayout) -> int:
        """Return the number of pipeline ranks that hold each stage."""
        return len(self.stages(layout).placement.locations_of_stage(0))

    def _stages_by_rank(self, layout: ParallelLayout) -> tuple[tuple[StageShape, ...], ...]:
        return stage_shapes_by_pp_rank(self.stages(layout))

    def _layout_memory(self, layout: ParallelLayout, recipe: ForecastRecipe) -> LayoutMemory:
        splits_wide = recipe.precision is not GemmPrecision.FP32
        parameters = self._parameters(self.stages(layout), layout.topology, splits_wide)
        workspace = workspace_from_shape(self.chunk_time_model(layout, recipe).shape, recipe)
        return LayoutMemory(parameters, workspace, recipe.moment_bytes // 2, recipe.averages_weights)

    def _slowest_node_factor(self, layout: ParallelLayout, recipe: ForecastRecipe) -> float:
        # Expected maximum of N normal variables: mean + deviation * sqrt(2 ln N), an upper estimate for small N.
        nodes = max(1, layout.topology.world_size // layout.topology.gpus_per_node)
        return 1 + recipe.jitter * math.sqrt(2 * math.log(nodes))
