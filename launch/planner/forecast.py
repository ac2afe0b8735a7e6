"""One optimizer step of one layout: the runtime's program on a clock, with the time of every rank by term."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from ...comm.topology import Link, Topology
from ...comm.trace import EDGE_WAIT, OPTIMIZER, REDUCE_WAIT
from ...parallelism.pipeline.communication import edges
from ...parallelism.pipeline.liveness import LiveInstruction, moments
from ...parallelism.pipeline.placement import Placement, StagePlace
from ...parallelism.pipeline.program import Op, Program
from ...parallelism.pipeline.schedules.registry import build_placement, build_program
from ...parallelism.pipeline.simulate import ProgramTimes, ideal_wait
from ...parallelism.pipeline.timetable import Timetable
from ...trainer.costs.cluster import ClusterConfig
from ...trainer.costs.flops import FlopCount, count_flops
from ...trainer.ledger.terms import report_view
from ...trainer.memory.chunk import StageShape
from ...trainer.model.config import ModelConfig
from ...trainer.model.stage_layout import split_layers
from .exchange_time import ExchangePricer, bytes_a_second
from .instruction_times import Kinds, Runs, kinds_of
from .kernel_times import Coverage
from .lanes import ChunkCosts
from .layout_memory import (
    ChunkCache,
    MemoryForecast,
    Parameters,
    forecast_memory,
    outside_of,
    stage_parameters,
    state_of,
)
from .operations import Shape
from .pricing import Compute
from .recipe import Recipe
from .update import CollectiveSeconds, Updates, WeightUses, exposed_gather, exposed_reduce


@dataclass(frozen=True)
class Layout:
    """How a model is spread, and in which order it runs."""

    topology: Topology
    schedule: str
    micro_batch: int = 1
    chunks: int | None = None
    layers: tuple[int, ...] | None = None
    """Of each stage; None: balanced by FLOPs, as the runtime does."""

    def micro_batches(self, global_batch: int) -> int:
        """Of one rank in one step."""
        return global_batch // (self.topology.dp * self.micro_batch)


@dataclass(frozen=True)
class Forecast:
    """What one optimizer step will take. Seconds and bytes; lists are by pipeline rank."""

    layout: Layout
    recipe: Recipe
    stages: tuple[StageShape, ...]
    replay: ProgramTimes
    terms: tuple[dict[str, float], ...]
    """The ledger's productive terms (`budget.terms.TERMS`) of each rank; each rank's add up to the step."""
    reduce: float
    """What shows of summing gradients over replicas, and of handing out weights to the next step."""
    optimizer: float
    memory: tuple[MemoryForecast, ...]
    flops: FlopCount
    tokens: int
    """Of the global batch."""
    peak_flops: float
    """Of one GPU, that utilization is measured against."""
    transfer: float
    """Of one message between stages."""
    coverage: Coverage

    @property
    def seconds(self) -> float:
        """Of the step."""
        return self.replay.makespan + self.reduce + self.optimizer

    @property
    def gpus(self) -> int:
        """All ranks."""
        return self.layout.topology.world_size

    @property
    def tokens_per_second_and_gpu(self) -> float:
        """Throughput of one GPU."""
        return self.tokens / self.seconds / self.gpus

    @property
    def mfu(self) -> float:
        """Main model, causal, without MTP: the convention of the published 38.94 %."""
        return self.flops.main * self.tokens_per_second_and_gpu / self.peak_flops

    @property
    def peak_memory(self) -> MemoryForecast:
        """Of the rank that needs most."""
        return max(self.memory, key=lambda memory: memory.total)

    @property
    def needed_memory(self) -> float:
        """Bytes of that rank with what fragmentation loses."""
        return max(needed_bytes(memory, self.recipe) for memory in self.memory)

    def gpu_hours(self, tokens: float) -> float:
        """Of training on so many tokens at this rate."""
        return tokens / self.tokens_per_second_and_gpu / 3600

    @cached_property
    def mean_terms(self) -> dict[str, float]:
        """The terms, mean over ranks."""
        return {name: sum(rank[name] for rank in self.terms) / len(self.terms) for name in self.terms[0]}

    @cached_property
    def bubble(self) -> float:
        """What of the mean edge_wait the program has by itself, as the ledger has it."""
        program = self.replay.program
        counts = Counter(entry.op for row in program.instructions for entry in row)
        mean = {op: sum(self.instruction_seconds(op)) / counts[op] if counts[op] else 0.0 for op in Op}
        return min(self.mean_terms[EDGE_WAIT], ideal_wait(program, mean) / program.ranks)

    def report_view(self) -> dict[str, float]:
        """The mean terms under the report's names, as the ledger and a timeline have them."""
        return report_view(self.mean_terms, self.bubble)

    def instruction_seconds(self, op: Op) -> list[float]:
        """Of all instructions of one kind, by rank."""
        program = self.replay.program
        return [
            sum(end - start for entry, start, end in zip(row, starts, ends, strict=True) if entry.op is op)
            for row, starts, ends in zip(program.instructions, self.replay.starts, self.replay.ends, strict=True)
        ]

    @property
    def limit(self) -> str:
        """What costs most beside computing, in words."""
        mean, busy, waits = self.mean_terms, self.replay.busy, self.replay.bubbles
        parts = {
            "waits between stages": sum(waits) / len(waits),
            "exposed exchanges": mean["exposed_exchange"],
            "gradients and optimizer": self.reduce + self.optimizer,
        }
        name = max(parts, key=lambda key: parts[key])
        uneven = max(busy) - sum(busy) / len(busy)
        detail = f" ({uneven / self.seconds:.1%} for uneven stages)" if name == "waits between stages" else ""
        return f"{name} {parts[name] / self.seconds:.1%} of the step{detail}"


def _terms(runs: Runs, replay: ProgramTimes, reduce: float, optimizer: float) -> Iterator[dict[str, float]]:
    """Of each rank. Behind its last instruction it waits for all others in the sums over ranks, as the runtime does."""
    for rank, (ends, busy) in enumerate(zip(replay.ends, replay.busy, strict=True)):
        last = replay.makespan - ends[-1] + reduce
        yield runs.terms(rank) | {EDGE_WAIT: ends[-1] - busy, REDUCE_WAIT: last, OPTIMIZER: optimizer}


def needed_bytes(memory: MemoryForecast, recipe: Recipe) -> float:
    """What a rank must have: flat buffers lie where they lie, all that comes and goes leaves gaps."""
    return memory.total + recipe.fragmentation * (memory.activations + memory.deferred + memory.working)


@dataclass
class Forecaster:
    """Forecasts steps of one model on one cluster. Keeps programs, partitions and prices between them."""

    model: ModelConfig
    cluster: ClusterConfig
    sequence_length: int
    flops: FlopCount = field(init=False)
    _programs: dict[tuple[str, int, int, int | None], Program] = field(default_factory=dict)
    _timetables: dict[tuple[str, int, int, int | None], Timetable] = field(default_factory=dict)
    _splits: dict[tuple[int, tuple[int, ...] | None], tuple[StageShape, ...]] = field(default_factory=dict)
    _parameters: dict[Layout, tuple[Parameters, ...]] = field(default_factory=dict)
    _costs: dict[tuple[Recipe, int, int], ChunkCosts] = field(default_factory=dict)
    _moments: dict[tuple[str, int, int, int], tuple[frozenset[LiveInstruction], ...]] = field(default_factory=dict)
    _chunks: ChunkCache = field(default_factory=ChunkCache)
    _uses: dict[tuple[str, int, int, int], WeightUses] = field(default_factory=dict)
    _kinds: dict[tuple[str, int, int, int], Kinds] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.flops = count_flops(self.model, self.sequence_length)

    def forecast(self, layout: Layout, recipe: Recipe, global_batch: int) -> Forecast:
        """Simulate one step; layout and batch must be legal. Raises `ConfigError` where figures are missing."""
        costs, stages = self.costs(layout, recipe), self.stages(layout)
        timetable = self._timetable(layout, layout.micro_batches(global_batch))
        program = timetable.program
        held = self._held(program.placement, stages)
        runs = Runs(costs, held, self._counts(program), recipe, self._slowest(layout, recipe))
        transfer = self.transfer(layout, recipe)
        replay = timetable.replay(runs.duration, transfer)
        reduce, optimizer = self.update(layout, recipe, replay)
        peak = self.cluster.peak_tflops
        assert peak is not None
        return Forecast(
            layout=layout,
            recipe=recipe,
            stages=stages,
            replay=replay,
            terms=tuple(_terms(runs, replay, reduce, optimizer)),
            reduce=reduce,
            optimizer=optimizer,
            memory=self.memory(layout, recipe, program),
            flops=self.flops,
            tokens=global_batch * self.sequence_length,
            peak_flops=peak * 1e12,
            transfer=transfer,
            coverage=costs.cost.coverage,
        )

    def prepare(self, layout: Layout, global_batch: int) -> None:
        """Build the program of a layout, so that forecasts of it only run it."""
        self._timetable(layout, layout.micro_batches(global_batch))

    def lower_bound(self, layout: Layout, recipe: Recipe, global_batch: int) -> float:
        """Seconds that no order of things can beat: the computing of the busiest rank, and the update."""
        costs, stages = self.costs(layout, recipe), self.stages(layout)
        placement = build_placement(layout.schedule, layout.topology.pp, layout.chunks)
        count = layout.micro_batches(global_batch) / len(placement.holders(0))
        held = self._held(placement, stages)
        busy = [count * sum(costs.compute_seconds(stage) for stage in rank) for rank in held]
        longest = max(busy) if recipe.imbalance else sum(busy) / len(busy)
        return longest * self._slowest(layout, recipe) + self._optimizer(layout, recipe)

    def memory(self, layout: Layout, recipe: Recipe, program: Program) -> tuple[MemoryForecast, ...]:
        """Of every pipeline rank."""
        held, shape = self._held(program.placement, self.stages(layout)), self._shape(layout, recipe)
        key = program.schedule, program.ranks, program.micro_batches, program.chunks
        if key not in self._moments:
            self._moments[key] = tuple(moments(program, *each) for each in enumerate(edges(program)))
        chunks = [self._chunks.of(stages, shape, recipe) for stages in held]
        states = [state_of(recipe, parameters) for parameters in self.parameters(layout)]
        outside = outside_of(shape, recipe, layout.topology)
        return tuple(
            forecast_memory(worst, own, state, outside)
            for worst, own, state in zip(self._moments[key], chunks, states, strict=True)
        )

    def static_memory(self, layout: Layout, recipe: Recipe) -> float:
        """Bytes of weights, gradients and optimizer of the rank that has most."""
        return max(state_of(recipe, held).total for held in self.parameters(layout))

    def program(self, layout: Layout, global_batch: int) -> Program:
        """The program of one step."""
        return self._program(layout, layout.micro_batches(global_batch))

    def stages(self, layout: Layout) -> tuple[StageShape, ...]:
        """What each stage holds, by the runtime's own partition."""
        count = build_placement(layout.schedule, layout.topology.pp, layout.chunks).stages
        key = count, layout.layers
        if key not in self._splits:
            ranges = split_layers(self.model, self.sequence_length, count, layout.layers).ranges
            dense = [sum(layer < self.model.first_k_dense_replace for layer in layers) for layers in ranges]
            self._splits[key] = tuple(
                StageShape(dense[stage], len(layers) - dense[stage], stage == 0, stage == count - 1)
                for stage, layers in enumerate(ranges)
            )
        return self._splits[key]

    def costs(self, layout: Layout, recipe: Recipe) -> ChunkCosts:
        """Prices of chunks."""
        key = recipe, layout.topology.ep, layout.micro_batch
        if key not in self._costs:
            cost = Compute.of(self.cluster, recipe)
            wire = ExchangePricer(self.cluster, recipe, cost.table, cost.coverage)
            self._costs[key] = ChunkCosts(self._shape(layout, recipe), cost, wire)
        return self._costs[key]

    def transfer(self, layout: Layout, recipe: Recipe) -> float:
        """Of one message between neighbors: bytes over the slowest link between any two."""
        topology = layout.topology
        if topology.pp == 1 or not recipe.edges:
            return 0.0
        if recipe.message_seconds is not None:
            return recipe.message_seconds
        tokens = self.sequence_length * layout.micro_batch
        table = self.costs(layout, recipe).cost.table
        measured = table.find("edge", "message", f"{layout.micro_batch}x{self.sequence_length}")
        if measured is not None:
            return measured.seconds
        cluster = self.cluster
        links = {topology.link(rank, rank + topology.dp) for rank in range(topology.dp)}
        crosses = Link.INFINIBAND in links
        name, link = ("infiniband_gbps", cluster.infiniband_gbps) if crosses else ("nvlink_gbps", cluster.nvlink_gbps)
        rate = bytes_a_second(cluster, name, link, "a message between stages")
        return tokens * self.model.hidden_size * recipe.wide / (rate * recipe.links)

    def update(self, layout: Layout, recipe: Recipe, replay: ProgramTimes) -> tuple[float, float]:
        """Seconds that show of summing gradients and handing out weights, and of the optimizer on the slowest rank."""
        updates = self._updates(layout, recipe)
        if updates.is_timed:
            both = [updates.timed(held) for held in self.parameters(layout)]
            return max(reduce for reduce, _ in both), max(optimizer for _, optimizer in both)
        uses, traffic = self._program_uses(replay.program), self._traffic(layout, updates)
        shown = exposed_reduce(uses, replay, traffic) + exposed_gather(uses, replay, traffic)
        return shown, self._optimizer(layout, recipe)

    def _optimizer(self, layout: Layout, recipe: Recipe) -> float:
        """On the rank that takes longest."""
        updates = self._updates(layout, recipe)
        if updates.is_timed:
            return max(updates.timed(held)[1] for held in self.parameters(layout))
        return max(map(updates.optimizer, self.parameters(layout)))

    def _updates(self, layout: Layout, recipe: Recipe) -> Updates:
        return Updates(self.cluster, recipe, self.costs(layout, recipe).cost.table, layout.topology)

    def _program_uses(self, program: Program) -> WeightUses:
        key = program.schedule, program.ranks, program.micro_batches, program.chunks
        if key not in self._uses:
            self._uses[key] = WeightUses.of(program)
        return self._uses[key]

    def _traffic(self, layout: Layout, updates: Updates) -> list[CollectiveSeconds]:
        """Of each stage's collectives; the last one's are also those of a replica of the embedding."""
        placement = build_placement(layout.schedule, layout.topology.pp, layout.chunks)
        stages, copies = self.stages(layout), len(placement.holders(0))
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
        return [updates.traffic(held) for held in counted]

    def parameters(self, layout: Layout) -> tuple[Parameters, ...]:
        """What one rank of each pipeline rank holds."""
        if layout not in self._parameters:
            placement = build_placement(layout.schedule, layout.topology.pp, layout.chunks)
            copies = len(placement.holders(0))
            held = self._held(placement, self.stages(layout))
            self._parameters[layout] = tuple(self._count(layout.topology, copies, stages) for stages in held)
        return self._parameters[layout]

    def _count(self, topology: Topology, copies: int, held: Sequence[StageShape]) -> Parameters:
        both = [stage_parameters(self.model, stage) for stage in held]
        dense, table = sum(part[0] for part in both), self.model.vocab_size * self.model.hidden_size
        first, last = any(stage.is_first for stage in held), any(stage.is_last for stage in held)
        replica = bool(self.model.num_nextn_predict_layers) and last and not first  # an embedding of its own, for MTP
        routed = sum(part[1] for part in both) / topology.ep
        tables = table * (first + last + replica)
        return Parameters(dense + table * replica, routed, topology.dp * copies, topology.edp * copies, tables)

    def _held(self, placement: Placement, stages: Sequence[StageShape]) -> list[tuple[StageShape, ...]]:
        return [
            tuple(stages[placement.stage(StagePlace(rank, chunk))] for chunk in range(placement.chunks))
            for rank in range(placement.ranks)
        ]

    def _timetable(self, layout: Layout, micro_batches: int) -> Timetable:
        key = layout.schedule, layout.topology.pp, micro_batches, layout.chunks
        if key not in self._timetables:
            self._timetables[key] = Timetable.of(self._program(layout, micro_batches))
        return self._timetables[key]

    def _program(self, layout: Layout, micro_batches: int) -> Program:
        key = layout.schedule, layout.topology.pp, micro_batches, layout.chunks
        if key not in self._programs:
            self._programs[key] = build_program(*key)
        return self._programs[key]

    def _counts(self, program: Program) -> Kinds:
        key = program.schedule, program.ranks, program.micro_batches, program.chunks
        if key not in self._kinds:
            self._kinds[key] = kinds_of(program)
        return self._kinds[key]

    def _shape(self, layout: Layout, recipe: Recipe) -> Shape:
        return Shape(self.model, self.sequence_length, layout.micro_batch, layout.topology.ep, recipe.skew)

    def _slowest(self, layout: Layout, recipe: Recipe) -> float:
        """The slowest of so many nodes: the expected maximum of normal speeds."""
        nodes = max(1, layout.topology.world_size // layout.topology.gpus_per_node)
        return 1 + recipe.jitter * math.sqrt(2 * math.log(nodes))
