"""Forecast of one optimizer step of one layout: the runtime's program simulated, with each rank's time by term."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from ...comm.topology import LinkType, Topology
from ...comm.trace import GRADIENT_SYNC_WAIT, OPTIMIZER, PIPELINE_WAIT
from ...parallelism.pipeline.chunk_walk import StageShape
from ...parallelism.pipeline.communication import derive_p2p_batches
from ...parallelism.pipeline.liveness import LiveInstruction, peak_instructions
from ...parallelism.pipeline.placement import StageLocation, StagePlacement
from ...parallelism.pipeline.program import Op, PipelineProgram
from ...parallelism.pipeline.schedules.registry import build_placement, build_program
from ...parallelism.pipeline.simulate import ProgramSimulator, SimulatedTimes, ideal_bubble_time
from ...trainer.costs.cluster import ClusterConfig
from ...trainer.costs.flops import FlopCount, count_flops
from ...trainer.ledger.terms import to_paper_terms
from ...trainer.model.config import ModelConfig
from ...trainer.model.stage_layout import split_layers
from .compute_time import ComputeTimeModel
from .exchange_time import ExchangeTimeModel, bytes_per_second
from .instruction_times import InstructionCounts, InstructionTimes, count_instructions
from .kernel_times import EvidenceCoverage
from .layout_memory import (
    ChunkMemoryCache,
    MemoryForecast,
    RankParameters,
    count_stage_parameters,
    forecast_rank_memory,
    model_state_bytes,
    non_allocator_memory,
)
from .operations import LayerWorkload
from .optimizer_step_time import (
    CollectiveSeconds,
    OptimizerStepTimeModel,
    WeightLiveness,
    exposed_all_gather_seconds,
    exposed_reduce_scatter_seconds,
)
from .recipe import ForecastRecipe
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
    memory_by_rank: tuple[MemoryForecast, ...]
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
    def peak_memory(self) -> MemoryForecast:
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
        program = self.program_times.program
        return [
            sum(end - start for entry, start, end in zip(row, starts, ends, strict=True) if entry.op is op)
            for row, starts, ends in zip(
                program.instructions, self.program_times.start_times, self.program_times.end_times, strict=True
            )
        ]

    @property
    def bottleneck(self) -> str:
        """Largest part of the step besides computing, in words."""
        mean, busy, waits = (
            self.mean_time_terms,
            self.program_times.busy_time_per_rank,
            self.program_times.bubble_time_per_rank,
        )
        parts = {
            "pipeline bubble": sum(waits) / len(waits),
            "exposed all-to-alls": mean["exposed_all_to_all"],
            "gradients and optimizer": self.exposed_collective_seconds + self.optimizer_seconds,
        }
        name = max(parts, key=lambda key: parts[key])
        uneven = max(busy) - sum(busy) / len(busy)
        detail = f" ({100 * uneven / self.step_seconds:.1f} % from uneven stages)" if name == "pipeline bubble" else ""
        return f"{name} {100 * parts[name] / self.step_seconds:.1f} %{detail}"


def _terms(
    runs: InstructionTimes, times: SimulatedTimes, reduce: float, optimizer: float
) -> Iterator[dict[str, float]]:
    """Yield the terms of each rank."""
    for rank, (ends, busy) in enumerate(zip(times.end_times, times.busy_time_per_rank, strict=True)):
        # The gradient norm is a sum over all ranks: after its last instruction every rank waits for the slowest one.
        last = times.makespan - ends[-1] + reduce
        yield runs.time_terms(rank) | {PIPELINE_WAIT: ends[-1] - busy, GRADIENT_SYNC_WAIT: last, OPTIMIZER: optimizer}


def bytes_with_fragmentation(memory: MemoryForecast, recipe: ForecastRecipe) -> float:
    """Return the bytes that a rank needs, fragmentation included."""
    # Weights, gradients and optimizer state are flat buffers allocated once; only memory that is allocated and freed
    # within a step leaves gaps.
    return memory.total + recipe.fragmentation * (memory.activations + memory.delayed_wgrad + memory.temporary)


@dataclass
class StepForecaster:
    """Forecaster of steps of one model on one cluster. Caches programs, partitions and prices between layouts."""

    model: ModelConfig
    cluster: ClusterConfig
    sequence_length: int
    flops_per_token: FlopCount = field(init=False)
    # A search tries recipes and precisions of one schedule: each cache is keyed by what its value depends on and
    # nothing else, so that a program is built once for all of them.
    _programs: dict[tuple[str, int, int, int | None], PipelineProgram] = field(default_factory=dict)
    _timetables: dict[tuple[str, int, int, int | None], ProgramSimulator] = field(default_factory=dict)
    _stage_shapes: dict[tuple[int, tuple[int, ...] | None], tuple[StageShape, ...]] = field(default_factory=dict)
    _parameters: dict[ParallelLayout, tuple[RankParameters, ...]] = field(default_factory=dict)
    _costs: dict[tuple[ForecastRecipe, int, int], ChunkTimeModel] = field(default_factory=dict)
    _peak_instructions: dict[tuple[str, int, int, int], tuple[frozenset[LiveInstruction], ...]] = field(
        default_factory=dict
    )
    _chunks: ChunkMemoryCache = field(default_factory=ChunkMemoryCache)
    _weight_liveness: dict[tuple[str, int, int, int], WeightLiveness] = field(default_factory=dict)
    _instruction_counts: dict[tuple[str, int, int, int], InstructionCounts] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.flops_per_token = count_flops(self.model, self.sequence_length)

    def forecast(self, layout: ParallelLayout, recipe: ForecastRecipe, global_batch: int) -> StepForecast:
        """Simulate one step; layout and batch must be legal. Raises `ConfigError` where figures are missing."""
        costs, stages = self.chunk_time_model(layout, recipe), self.stage_shapes(layout)
        timetable = self._timetable(layout, layout.num_micro_batches(global_batch))
        program = timetable.program
        held = self._stages_by_rank(program.placement, stages)
        runs = InstructionTimes(
            costs, held, self._count_instructions(program), recipe, self._slowest_node_factor(layout, recipe)
        )
        transfer = self.p2p_seconds(layout, recipe)
        times = timetable.simulate(runs.duration, transfer)
        reduce, optimizer = self.optimizer_step_seconds(layout, recipe, times)
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
            memory_by_rank=self.memory_by_rank(layout, recipe, program),
            flops_per_token=self.flops_per_token,
            global_batch_tokens=global_batch * self.sequence_length,
            peak_flops_per_gpu=peak * 1e12,
            p2p_seconds=transfer,
            evidence_coverage=costs.compute_model.coverage,
        )

    def cache_program(self, layout: ParallelLayout, global_batch: int) -> None:
        """Build and cache the program of a layout, so that its forecasts only simulate it."""
        self._timetable(layout, layout.num_micro_batches(global_batch))

    def step_seconds_lower_bound(self, layout: ParallelLayout, recipe: ForecastRecipe, global_batch: int) -> float:
        """Return a lower bound of the step in any schedule: computing of the busiest rank plus the optimizer."""
        costs, stages = self.chunk_time_model(layout, recipe), self.stage_shapes(layout)
        placement = build_placement(layout.schedule, layout.topology.pp, layout.chunks_per_rank)
        # DualPipe holds each stage on two ranks (its parameters are doubled), and each runs half of the micro-batches.
        count = layout.num_micro_batches(global_batch) / len(placement.locations_of_stage(0))
        held = self._stages_by_rank(placement, stages)
        busy = [count * sum(costs.compute_seconds(stage) for stage in rank) for rank in held]
        longest = max(busy) if recipe.uneven_stages else sum(busy) / len(busy)
        return longest * self._slowest_node_factor(layout, recipe) + self._optimizer(layout, recipe)

    def memory_by_rank(
        self, layout: ParallelLayout, recipe: ForecastRecipe, program: PipelineProgram
    ) -> tuple[MemoryForecast, ...]:
        """Return the memory of every pipeline rank."""
        held, shape = self._stages_by_rank(program.placement, self.stage_shapes(layout)), self._workload(layout, recipe)
        key = program.schedule, program.ranks, program.num_micro_batches, program.chunks_per_rank
        if key not in self._peak_instructions:
            self._peak_instructions[key] = tuple(
                peak_instructions(program, *each) for each in enumerate(derive_p2p_batches(program))
            )
        chunks = [self._chunks.get_chunks(stages, shape, recipe) for stages in held]
        states = [model_state_bytes(recipe, parameters) for parameters in self.parameters_by_rank(layout)]
        outside = non_allocator_memory(shape, recipe, layout.topology)
        return tuple(
            forecast_rank_memory(worst, rank_chunks, state, outside)
            for worst, rank_chunks, state in zip(self._peak_instructions[key], chunks, states, strict=True)
        )

    def static_memory_bytes(self, layout: ParallelLayout, recipe: ForecastRecipe) -> float:
        """Return the bytes of weights, gradients and optimizer state of the rank with most."""
        return max(model_state_bytes(recipe, held).total for held in self.parameters_by_rank(layout))

    def step_program(self, layout: ParallelLayout, global_batch: int) -> PipelineProgram:
        """Return the program of one step."""
        return self._program(layout, layout.num_micro_batches(global_batch))

    def stage_shapes(self, layout: ParallelLayout) -> tuple[StageShape, ...]:
        """Return the contents of each stage, by the runtime's partition."""
        count = build_placement(layout.schedule, layout.topology.pp, layout.chunks_per_rank).num_stages
        key = count, layout.layers_per_stage
        if key not in self._stage_shapes:
            ranges = split_layers(self.model, self.sequence_length, count, layout.layers_per_stage).layer_ranges
            dense = [sum(layer < self.model.first_k_dense_replace for layer in layers) for layers in ranges]
            self._stage_shapes[key] = tuple(
                StageShape(dense[stage], len(layers) - dense[stage], stage == 0, stage == count - 1)
                for stage, layers in enumerate(ranges)
            )
        return self._stage_shapes[key]

    def chunk_time_model(self, layout: ParallelLayout, recipe: ForecastRecipe) -> ChunkTimeModel:
        """Return the chunk time model of a layout and recipe."""
        key = recipe, layout.topology.ep, layout.micro_batch_size
        if key not in self._costs:
            cost = ComputeTimeModel.from_cluster(self.cluster, recipe)
            wire = ExchangeTimeModel(self.cluster, recipe, cost.table, cost.coverage)
            self._costs[key] = ChunkTimeModel(self._workload(layout, recipe), cost, wire)
        return self._costs[key]

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
        cluster = self.cluster
        # A chunk's output is one hidden state per token: 58.7 MB for V3, 1.5 ms at 40 GB/s. The slowest link counts,
        # since one late rank delays its whole expert-parallel group.
        links = {topology.link_type(rank, rank + topology.dp) for rank in range(topology.dp)}
        crosses = LinkType.INFINIBAND in links
        name, link = (
            ("infiniband_gb_per_second", cluster.infiniband_gb_per_second)
            if crosses
            else ("nvlink_gb_per_second", cluster.nvlink_gb_per_second)
        )
        rate = bytes_per_second(cluster, name, link, "a P2P message between stages")
        return tokens * self.model.hidden_size * recipe.high_precision_bytes / (rate * recipe.link_speed_factor)

    def optimizer_step_seconds(
        self, layout: ParallelLayout, recipe: ForecastRecipe, times: SimulatedTimes
    ) -> tuple[float, float]:
        """Return the exposed seconds of gradient and weight collectives, and those of the slowest rank's optimizer."""
        step_model = self._optimizer_step_model(layout, recipe)
        if step_model.is_measured:
            both = [step_model.measured_seconds(held) for held in self.parameters_by_rank(layout)]
            return max(reduce for reduce, _ in both), max(optimizer for _, optimizer in both)
        uses, traffic = self._program_weight_liveness(times.program), self._collective_seconds(layout, step_model)
        shown = exposed_reduce_scatter_seconds(uses, times, traffic) + exposed_all_gather_seconds(uses, times, traffic)
        return shown, self._optimizer(layout, recipe)

    def _optimizer(self, layout: ParallelLayout, recipe: ForecastRecipe) -> float:
        """Return the optimizer's seconds on the slowest rank."""
        step_model = self._optimizer_step_model(layout, recipe)
        if step_model.is_measured:
            return max(step_model.measured_seconds(held)[1] for held in self.parameters_by_rank(layout))
        return max(map(step_model.optimizer_seconds, self.parameters_by_rank(layout)))

    def _optimizer_step_model(self, layout: ParallelLayout, recipe: ForecastRecipe) -> OptimizerStepTimeModel:
        return OptimizerStepTimeModel(
            self.cluster, recipe, self.chunk_time_model(layout, recipe).compute_model.table, layout.topology
        )

    def _program_weight_liveness(self, program: PipelineProgram) -> WeightLiveness:
        key = program.schedule, program.ranks, program.num_micro_batches, program.chunks_per_rank
        if key not in self._weight_liveness:
            self._weight_liveness[key] = WeightLiveness.from_program(program)
        return self._weight_liveness[key]

    def _collective_seconds(
        self, layout: ParallelLayout, step_model: OptimizerStepTimeModel
    ) -> list[CollectiveSeconds]:
        """Return the collective times of each stage."""
        placement = build_placement(layout.schedule, layout.topology.pp, layout.chunks_per_rank)
        stages, copies = self.stage_shapes(layout), len(placement.locations_of_stage(0))
        together = any(held[0].is_first and held[-1].is_last for held in self._stages_by_rank(placement, stages))
        table = self.model.vocab_size * self.model.hidden_size
        counted = []
        for stage in stages:
            held = self._rank_parameters(layout.topology, copies, [stage])
            spare = (
                table
                if stage.is_last and not stage.is_first and together and self.model.num_nextn_predict_layers
                else 0
            )
            # MTP embeds tokens in the last stage. Where one rank holds the first and the last stage, as in DualPipe,
            # they share the embedding (report §3.2.3), and the first stage's collectives contain it.
            counted.append(replace(held, dense=held.dense - spare))
        return [step_model.collective_seconds(held) for held in counted]

    def parameters_by_rank(self, layout: ParallelLayout) -> tuple[RankParameters, ...]:
        """Return the parameters of one rank per pipeline rank."""
        if layout not in self._parameters:
            placement = build_placement(layout.schedule, layout.topology.pp, layout.chunks_per_rank)
            copies = len(placement.locations_of_stage(0))
            held = self._stages_by_rank(placement, self.stage_shapes(layout))
            self._parameters[layout] = tuple(self._rank_parameters(layout.topology, copies, stages) for stages in held)
        return self._parameters[layout]

    def _rank_parameters(self, topology: Topology, copies: int, held: Sequence[StageShape]) -> RankParameters:
        both = [count_stage_parameters(self.model, stage) for stage in held]
        dense, table = sum(part[0] for part in both), self.model.vocab_size * self.model.hidden_size
        first, last = any(stage.is_first for stage in held), any(stage.is_last for stage in held)
        replica = bool(self.model.num_nextn_predict_layers) and last and not first  # MTP needs the embedding there
        routed = sum(part[1] for part in both) / topology.ep
        tables = table * (first + last + replica)
        return RankParameters(dense + table * replica, routed, topology.dp * copies, topology.edp * copies, tables)

    def _stages_by_rank(self, placement: StagePlacement, stages: Sequence[StageShape]) -> list[tuple[StageShape, ...]]:
        return [
            tuple(stages[placement.stage_at(StageLocation(rank, chunk))] for chunk in range(placement.chunks_per_rank))
            for rank in range(placement.ranks)
        ]

    def _timetable(self, layout: ParallelLayout, micro_batches: int) -> ProgramSimulator:
        key = layout.schedule, layout.topology.pp, micro_batches, layout.chunks_per_rank
        if key not in self._timetables:
            self._timetables[key] = ProgramSimulator.from_program(self._program(layout, micro_batches))
        return self._timetables[key]

    def _program(self, layout: ParallelLayout, micro_batches: int) -> PipelineProgram:
        key = layout.schedule, layout.topology.pp, micro_batches, layout.chunks_per_rank
        if key not in self._programs:
            self._programs[key] = build_program(*key)
        return self._programs[key]

    def _count_instructions(self, program: PipelineProgram) -> InstructionCounts:
        key = program.schedule, program.ranks, program.num_micro_batches, program.chunks_per_rank
        if key not in self._instruction_counts:
            self._instruction_counts[key] = count_instructions(program)
        return self._instruction_counts[key]

    def _workload(self, layout: ParallelLayout, recipe: ForecastRecipe) -> LayerWorkload:
        return LayerWorkload(self.model, self.sequence_length, layout.micro_batch_size, layout.topology.ep, recipe.skew)

    def _slowest_node_factor(self, layout: ParallelLayout, recipe: ForecastRecipe) -> float:
        """Return the time factor of the slowest node."""
        # Expected maximum of N normal variables: mean + deviation * sqrt(2 ln N), an upper estimate for small N.
        nodes = max(1, layout.topology.world_size // layout.topology.gpus_per_node)
        return 1 + recipe.jitter * math.sqrt(2 * math.log(nodes))
