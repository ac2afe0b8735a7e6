"""One optimizer step of one layout: the runtime's program on a clock, with the time of every rank by term."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from ...comm.topology import LinkType, Topology
from ...comm.trace import GRADIENT_SYNC_WAIT, OPTIMIZER, PIPELINE_WAIT
from ...parallelism.pipeline.communication import derive_p2p_batches
from ...parallelism.pipeline.liveness import LiveInstruction, peak_instructions
from ...parallelism.pipeline.placement import StageLocation, StagePlacement
from ...parallelism.pipeline.program import Op, PipelineProgram
from ...parallelism.pipeline.program_simulator import ProgramSimulator
from ...parallelism.pipeline.schedules.registry import build_placement, build_program
from ...parallelism.pipeline.simulate import SimulatedTimes, ideal_bubble_time
from ...trainer.costs.cluster import ClusterConfig
from ...trainer.costs.flops import FlopCount, count_flops
from ...trainer.ledger.terms import to_paper_terms
from ...trainer.memory.chunk import StageShape
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
    """How a model is spread, and in which order it runs."""

    topology: Topology
    schedule: str
    micro_batch_size: int = 1
    chunks_per_rank: int | None = None
    layers_per_stage: tuple[int, ...] | None = None
    """Of each stage; None: balanced by FLOPs, as the runtime does."""

    def num_micro_batches(self, global_batch: int) -> int:
        """Of one rank in one step."""
        return global_batch // (self.topology.dp * self.micro_batch_size)


@dataclass(frozen=True)
class StepForecast:
    """What one optimizer step will take. Seconds and bytes; lists are by pipeline rank."""

    layout: ParallelLayout
    recipe: ForecastRecipe
    stage_shapes: tuple[StageShape, ...]
    program_times: SimulatedTimes
    time_terms_by_rank: tuple[dict[str, float], ...]
    """The ledger's productive terms (`budget.terms.TERMS`) of each rank; each rank's add up to the step."""
    exposed_collective_seconds: float
    """What shows of summing gradients over replicas, and of handing out weights to the next step."""
    optimizer_seconds: float
    memory_by_rank: tuple[MemoryForecast, ...]
    flops_per_token: FlopCount
    global_batch_tokens: int
    """Of the global batch."""
    peak_flops_per_gpu: float
    """Of one GPU, that utilization is measured against."""
    p2p_seconds: float
    """Of one message between stages."""
    evidence_coverage: EvidenceCoverage

    @property
    def step_seconds(self) -> float:
        """Of the step."""
        return self.program_times.makespan + self.exposed_collective_seconds + self.optimizer_seconds

    @property
    def gpus(self) -> int:
        """All ranks."""
        return self.layout.topology.world_size

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Throughput of one GPU."""
        return self.global_batch_tokens / self.step_seconds / self.gpus

    @property
    def mfu(self) -> float:
        """Main model, causal, without MTP: the convention of the published 38.94 %."""
        return self.flops_per_token.main_model * self.tokens_per_second_per_gpu / self.peak_flops_per_gpu

    @property
    def peak_memory(self) -> MemoryForecast:
        """Of the rank that needs most."""
        return max(self.memory_by_rank, key=lambda memory: memory.total)

    @property
    def peak_bytes_with_fragmentation(self) -> float:
        """Bytes of that rank with what fragmentation loses."""
        return max(bytes_with_fragmentation(memory, self.recipe) for memory in self.memory_by_rank)

    def gpu_hours(self, tokens: float) -> float:
        """Of training on so many tokens at this rate."""
        return tokens / self.tokens_per_second_per_gpu / 3600

    @cached_property
    def mean_time_terms(self) -> dict[str, float]:
        """The terms, mean over ranks."""
        return {
            name: sum(rank[name] for rank in self.time_terms_by_rank) / len(self.time_terms_by_rank)
            for name in self.time_terms_by_rank[0]
        }

    @cached_property
    def bubble_seconds(self) -> float:
        """What of the mean pipeline_wait the program has by itself, as the ledger has it."""
        program = self.program_times.program
        counts = Counter(entry.op for row in program.instructions for entry in row)
        mean = {op: sum(self.instruction_seconds(op)) / counts[op] if counts[op] else 0.0 for op in Op}
        return min(self.mean_time_terms[PIPELINE_WAIT], ideal_bubble_time(program, mean) / program.ranks)

    def deepseek_report_terms(self) -> dict[str, float]:
        """The mean terms under the report's names, as the ledger and a timeline have them."""
        return to_paper_terms(self.mean_time_terms, self.bubble_seconds)

    def instruction_seconds(self, op: Op) -> list[float]:
        """Of all instructions of one kind, by rank."""
        program = self.program_times.program
        return [
            sum(end - start for entry, start, end in zip(row, starts, ends, strict=True) if entry.op is op)
            for row, starts, ends in zip(
                program.instructions, self.program_times.start_times, self.program_times.end_times, strict=True
            )
        ]

    @property
    def bottleneck(self) -> str:
        """What costs most beside computing, in words."""
        mean, busy, waits = (
            self.mean_time_terms,
            self.program_times.busy_time_per_rank,
            self.program_times.bubble_time_per_rank,
        )
        parts = {
            "waits between stages": sum(waits) / len(waits),
            "exposed all-to-alls": mean["exposed_all_to_all"],
            "gradients and optimizer": self.exposed_collective_seconds + self.optimizer_seconds,
        }
        name = max(parts, key=lambda key: parts[key])
        uneven = max(busy) - sum(busy) / len(busy)
        detail = f" ({uneven / self.step_seconds:.1%} for uneven stages)" if name == "waits between stages" else ""
        return f"{name} {parts[name] / self.step_seconds:.1%} of the step{detail}"


def _terms(
    runs: InstructionTimes, replay: SimulatedTimes, reduce: float, optimizer: float
) -> Iterator[dict[str, float]]:
    """Of each rank. Behind its last instruction it waits for all others in the sums over ranks, as the runtime does."""
    for rank, (ends, busy) in enumerate(zip(replay.end_times, replay.busy_time_per_rank, strict=True)):
        last = replay.makespan - ends[-1] + reduce
        yield runs.time_terms(rank) | {PIPELINE_WAIT: ends[-1] - busy, GRADIENT_SYNC_WAIT: last, OPTIMIZER: optimizer}


def bytes_with_fragmentation(memory: MemoryForecast, recipe: ForecastRecipe) -> float:
    """What a rank must have: flat buffers lie where they lie, all that comes and goes leaves gaps."""
    return memory.total + recipe.fragmentation * (memory.activations + memory.deferred + memory.working)


@dataclass
class StepForecaster:
    """Forecasts steps of one model on one cluster. Keeps programs, partitions and prices between them."""

    model: ModelConfig
    cluster: ClusterConfig
    sequence_length: int
    flops_per_token: FlopCount = field(init=False)
    _programs: dict[tuple[str, int, int, int | None], PipelineProgram] = field(default_factory=dict)
    _timetables: dict[tuple[str, int, int, int | None], ProgramSimulator] = field(default_factory=dict)
    _splits: dict[tuple[int, tuple[int, ...] | None], tuple[StageShape, ...]] = field(default_factory=dict)
    _parameters: dict[ParallelLayout, tuple[RankParameters, ...]] = field(default_factory=dict)
    _costs: dict[tuple[ForecastRecipe, int, int], ChunkTimeModel] = field(default_factory=dict)
    _moments: dict[tuple[str, int, int, int], tuple[frozenset[LiveInstruction], ...]] = field(default_factory=dict)
    _chunks: ChunkMemoryCache = field(default_factory=ChunkMemoryCache)
    _uses: dict[tuple[str, int, int, int], WeightLiveness] = field(default_factory=dict)
    _kinds: dict[tuple[str, int, int, int], InstructionCounts] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.flops_per_token = count_flops(self.model, self.sequence_length)

    def forecast(self, layout: ParallelLayout, recipe: ForecastRecipe, global_batch: int) -> StepForecast:
        """Simulate one step; layout and batch must be legal. Raises `ConfigError` where figures are missing."""
        costs, stages = self.chunk_time_model(layout, recipe), self.stage_shapes(layout)
        timetable = self._timetable(layout, layout.num_micro_batches(global_batch))
        program = timetable.program
        held = self._held(program.placement, stages)
        runs = InstructionTimes(costs, held, self._counts(program), recipe, self._slowest(layout, recipe))
        transfer = self.p2p_seconds(layout, recipe)
        replay = timetable.simulate(runs.duration, transfer)
        reduce, optimizer = self.optimizer_step_seconds(layout, recipe, replay)
        peak = self.cluster.peak_tflops
        assert peak is not None
        return StepForecast(
            layout=layout,
            recipe=recipe,
            stage_shapes=stages,
            program_times=replay,
            time_terms_by_rank=tuple(_terms(runs, replay, reduce, optimizer)),
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
        """Build the program of a layout, so that forecasts of it only run it."""
        self._timetable(layout, layout.num_micro_batches(global_batch))

    def step_seconds_lower_bound(self, layout: ParallelLayout, recipe: ForecastRecipe, global_batch: int) -> float:
        """Seconds that no order of things can beat: the computing of the busiest rank, and the update."""
        costs, stages = self.chunk_time_model(layout, recipe), self.stage_shapes(layout)
        placement = build_placement(layout.schedule, layout.topology.pp, layout.chunks_per_rank)
        count = layout.num_micro_batches(global_batch) / len(placement.locations_of_stage(0))
        held = self._held(placement, stages)
        busy = [count * sum(costs.compute_seconds(stage) for stage in rank) for rank in held]
        longest = max(busy) if recipe.uneven_stages else sum(busy) / len(busy)
        return longest * self._slowest(layout, recipe) + self._optimizer(layout, recipe)

    def memory_by_rank(
        self, layout: ParallelLayout, recipe: ForecastRecipe, program: PipelineProgram
    ) -> tuple[MemoryForecast, ...]:
        """Of every pipeline rank."""
        held, shape = self._held(program.placement, self.stage_shapes(layout)), self._shape(layout, recipe)
        key = program.schedule, program.ranks, program.num_micro_batches, program.chunks_per_rank
        if key not in self._moments:
            self._moments[key] = tuple(
                peak_instructions(program, *each) for each in enumerate(derive_p2p_batches(program))
            )
        chunks = [self._chunks.get_chunks(stages, shape, recipe) for stages in held]
        states = [model_state_bytes(recipe, parameters) for parameters in self.parameters_by_rank(layout)]
        outside = non_allocator_memory(shape, recipe, layout.topology)
        return tuple(
            forecast_rank_memory(worst, own, state, outside)
            for worst, own, state in zip(self._moments[key], chunks, states, strict=True)
        )

    def static_memory_bytes(self, layout: ParallelLayout, recipe: ForecastRecipe) -> float:
        """Bytes of weights, gradients and optimizer of the rank that has most."""
        return max(model_state_bytes(recipe, held).total for held in self.parameters_by_rank(layout))

    def step_program(self, layout: ParallelLayout, global_batch: int) -> PipelineProgram:
        """The program of one step."""
        return self._program(layout, layout.num_micro_batches(global_batch))

    def stage_shapes(self, layout: ParallelLayout) -> tuple[StageShape, ...]:
        """What each stage holds, by the runtime's own partition."""
        count = build_placement(layout.schedule, layout.topology.pp, layout.chunks_per_rank).num_stages
        key = count, layout.layers_per_stage
        if key not in self._splits:
            ranges = split_layers(self.model, self.sequence_length, count, layout.layers_per_stage).layer_ranges
            dense = [sum(layer < self.model.first_k_dense_replace for layer in layers) for layers in ranges]
            self._splits[key] = tuple(
                StageShape(dense[stage], len(layers) - dense[stage], stage == 0, stage == count - 1)
                for stage, layers in enumerate(ranges)
            )
        return self._splits[key]

    def chunk_time_model(self, layout: ParallelLayout, recipe: ForecastRecipe) -> ChunkTimeModel:
        """Prices of chunks."""
        key = recipe, layout.topology.ep, layout.micro_batch_size
        if key not in self._costs:
            cost = ComputeTimeModel.from_cluster(self.cluster, recipe)
            wire = ExchangeTimeModel(self.cluster, recipe, cost.table, cost.coverage)
            self._costs[key] = ChunkTimeModel(self._shape(layout, recipe), cost, wire)
        return self._costs[key]

    def p2p_seconds(self, layout: ParallelLayout, recipe: ForecastRecipe) -> float:
        """Of one message between neighbors: bytes over the slowest link between any two."""
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
        links = {topology.link_type(rank, rank + topology.dp) for rank in range(topology.dp)}
        crosses = LinkType.INFINIBAND in links
        name, link = (
            ("infiniband_gb_per_second", cluster.infiniband_gb_per_second)
            if crosses
            else ("nvlink_gb_per_second", cluster.nvlink_gb_per_second)
        )
        rate = bytes_per_second(cluster, name, link, "a message between stages")
        return tokens * self.model.hidden_size * recipe.high_precision_bytes / (rate * recipe.link_speed_factor)

    def optimizer_step_seconds(
        self, layout: ParallelLayout, recipe: ForecastRecipe, replay: SimulatedTimes
    ) -> tuple[float, float]:
        """Seconds that show of summing gradients and handing out weights, and of the optimizer on the slowest rank."""
        updates = self._updates(layout, recipe)
        if updates.is_measured:
            both = [updates.measured_seconds(held) for held in self.parameters_by_rank(layout)]
            return max(reduce for reduce, _ in both), max(optimizer for _, optimizer in both)
        uses, traffic = self._program_uses(replay.program), self._traffic(layout, updates)
        shown = exposed_reduce_scatter_seconds(uses, replay, traffic) + exposed_all_gather_seconds(
            uses, replay, traffic
        )
        return shown, self._optimizer(layout, recipe)

    def _optimizer(self, layout: ParallelLayout, recipe: ForecastRecipe) -> float:
        """On the rank that takes longest."""
        updates = self._updates(layout, recipe)
        if updates.is_measured:
            return max(updates.measured_seconds(held)[1] for held in self.parameters_by_rank(layout))
        return max(map(updates.optimizer_seconds, self.parameters_by_rank(layout)))

    def _updates(self, layout: ParallelLayout, recipe: ForecastRecipe) -> OptimizerStepTimeModel:
        return OptimizerStepTimeModel(
            self.cluster, recipe, self.chunk_time_model(layout, recipe).compute_model.table, layout.topology
        )

    def _program_uses(self, program: PipelineProgram) -> WeightLiveness:
        key = program.schedule, program.ranks, program.num_micro_batches, program.chunks_per_rank
        if key not in self._uses:
            self._uses[key] = WeightLiveness.from_program(program)
        return self._uses[key]

    def _traffic(self, layout: ParallelLayout, updates: OptimizerStepTimeModel) -> list[CollectiveSeconds]:
        """Of each stage's collectives; the last one's are also those of a replica of the embedding."""
        placement = build_placement(layout.schedule, layout.topology.pp, layout.chunks_per_rank)
        stages, copies = self.stage_shapes(layout), len(placement.locations_of_stage(0))
        together = any(held[0].is_first and held[-1].is_last for held in self._held(placement, stages))
        table = self.model.vocab_size * self.model.hidden_size
        counted = []
        for stage in stages:
            held = self._count(layout.topology, copies, [stage])
            spare = (
                table
                if stage.is_last and not stage.is_first and together and self.model.num_nextn_predict_layers
                else 0
            )
            counted.append(replace(held, dense=held.dense - spare))  # the table is the first stage's there
        return [updates.collective_seconds(held) for held in counted]

    def parameters_by_rank(self, layout: ParallelLayout) -> tuple[RankParameters, ...]:
        """What one rank of each pipeline rank holds."""
        if layout not in self._parameters:
            placement = build_placement(layout.schedule, layout.topology.pp, layout.chunks_per_rank)
            copies = len(placement.locations_of_stage(0))
            held = self._held(placement, self.stage_shapes(layout))
            self._parameters[layout] = tuple(self._count(layout.topology, copies, stages) for stages in held)
        return self._parameters[layout]

    def _count(self, topology: Topology, copies: int, held: Sequence[StageShape]) -> RankParameters:
        both = [count_stage_parameters(self.model, stage) for stage in held]
        dense, table = sum(part[0] for part in both), self.model.vocab_size * self.model.hidden_size
        first, last = any(stage.is_first for stage in held), any(stage.is_last for stage in held)
        replica = bool(self.model.num_nextn_predict_layers) and last and not first  # an embedding of its own, for MTP
        routed = sum(part[1] for part in both) / topology.ep
        tables = table * (first + last + replica)
        return RankParameters(dense + table * replica, routed, topology.dp * copies, topology.edp * copies, tables)

    def _held(self, placement: StagePlacement, stages: Sequence[StageShape]) -> list[tuple[StageShape, ...]]:
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

    def _counts(self, program: PipelineProgram) -> InstructionCounts:
        key = program.schedule, program.ranks, program.num_micro_batches, program.chunks_per_rank
        if key not in self._kinds:
            self._kinds[key] = count_instructions(program)
        return self._kinds[key]

    def _shape(self, layout: ParallelLayout, recipe: ForecastRecipe) -> LayerWorkload:
        return LayerWorkload(self.model, self.sequence_length, layout.micro_batch_size, layout.topology.ep, recipe.skew)

    def _slowest(self, layout: ParallelLayout, recipe: ForecastRecipe) -> float:
        """The slowest of so many nodes: the expected maximum of normal speeds."""
        nodes = max(1, layout.topology.world_size // layout.topology.gpus_per_node)
        return 1 + recipe.jitter * math.sqrt(2 * math.log(nodes))
