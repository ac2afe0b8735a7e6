"""One rank of `shoestring calibrate`: times of phases, token dispatches, P2P messages and updates with all ranks busy.

Phases are timed inside whole steps of one process, so that caches and allocator are in the same state as in a run. No
layout that distributes a model is run: communication between ranks is timed separately.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from statistics import median
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from ...comm.async_comm import InlineCommunicator, build_async_communicator
from ...comm.exchange.config import ExchangeConfig
from ...comm.exchange.factory import build_token_exchange
from ...comm.groups import ProcessGroups
from ...comm.topology import Topology
from ...comm.trace import EXPOSED_ALL_TO_ALL, GRADIENT_SYNC_WAIT, OPTIMIZER, ExchangeLabel, TimelineTrack
from ...comm.traffic import TrafficCounter
from ...parallelism.pipeline.chunk_walk import (
    ChunkInterpreter,
    ExchangeOperation,
    LayerPart,
    MoELayerInterpreter,
    StageShape,
    walk_backward,
)
from ...parallelism.pipeline.instruction import run_to_completion
from ...trainer.build import PipelineRuntime, build_stepper
from ...trainer.config import RunConfig
from ...trainer.data.samples import TokenBatch
from ...trainer.model.config import ModelConfig
from ...trainer.model.model import Model, initialize_weights
from ...trainer.model.stage_layout import StageLayout
from ...trainer.run.step import Stepper, StepSettings
from ...trainer.telemetry.trace import Span, TraceRecorder
from ..planner.kernel_times import KernelMeasurement
from ..planner.operations import ComputePhase
from ..run.on_ranks import RankContext
from .bench_exchange_rank import DispatchInputs, time_exchange_operations

T = TypeVar("T")

_LIMIT = timedelta(minutes=2)
_WARM_UP = 3
_COLLECTIVES_PER_STEP = 2  # small ones: target counts, and the sums of a step (trainer/run/step.py)
_SOURCE = "shoestring calibrate: median on this machine, all ranks busy"


def calibrate_rank(rank: RankContext, argument: tuple[RunConfig, int]) -> list[KernelMeasurement]:
    """Measure the run of `argument`, with that number of repeats; return the rows, which are equal on all ranks."""
    config, repeats = argument
    topology = Topology(ep=rank.world_size, gpus_per_node=rank.world_size)
    return list(Calibration(replace(config, topology=topology), rank.open_groups(topology), repeats).measure_rows())


@dataclass(frozen=True)
class Calibration:
    """Measurements of one rank."""

    config: RunConfig
    groups: ProcessGroups
    repeats: int

    def measure_rows(self) -> Iterator[KernelMeasurement]:
        """Yield every row of the table; collective, and equal on all ranks."""
        torch.manual_seed(self.groups.rank)
        share = self.config.training.global_batch_size // self.groups.world.size
        for micro_batch in (2**power for power in range(share.bit_length())):
            shape = f"{micro_batch}x{self.config.training.sequence_length}"
            for ranks in self.exchange_group_sizes:
                for exchange, seconds in self._exchanges(micro_batch, ranks).items():
                    yield self._row("phase", exchange.value, f"{shape}/{ranks}", seconds)
            for name, seconds in self._phases(micro_batch).items():
                for ranks in self.exchange_group_sizes:
                    yield self._row("phase", name, f"{shape}/{ranks}", seconds)
            yield self._row("edge", "message", shape, self._message(micro_batch))
        yield from self._updates()

    @property
    def exchange_group_sizes(self) -> list[int]:
        """Sizes of expert-parallel groups that these ranks can form."""
        world, experts = self.groups.world.size, self.config.model.n_routed_experts
        return [ranks for ranks in range(1, world + 1) if world % ranks == 0 and experts % ranks == 0]

    def _exchange_groups(self, ranks: int) -> ProcessGroups:
        """Create the groups for token dispatches over `ranks` ranks; all groups are measured at the same time."""
        world, per_node = self.groups.world.size, self.config.topology.gpus_per_node
        if ranks == 1:
            return ProcessGroups.create(Topology(gpus_per_node=per_node), 0, _LIMIT)
        topology = Topology(edp=world // ranks, ep=ranks, gpus_per_node=per_node)
        return ProcessGroups.create(topology, self.groups.rank, _LIMIT)

    def _row(self, kind: str, name: str, role: str, seconds: float) -> KernelMeasurement:
        """Build a row from the time of the slowest rank."""
        slowest = self.groups.world.all_reduce_max(torch.tensor([seconds], dtype=torch.float64), "slowest rank")
        microseconds = round(float(slowest) * 1e6, 2)
        return KernelMeasurement(kind, name, role, "any", 0, 0, 0, microseconds, "us", "measured", _SOURCE)

    def _phases(self, micro_batch: int) -> dict[str, float]:
        """Return the seconds of every phase, and of the rest of a chunk."""
        _, recorder, step = self._stepper(micro_batch)
        runs = [phase_seconds_from_spans(spans, self.config) for spans, _ in self._timed_steps(recorder, step)]
        return {name: median(run[name] for run in runs) for name in runs[0]}

    def _timed_steps(self, recorder: TraceRecorder, step: Callable[[], object]) -> Iterator[tuple[list[Span], float]]:
        """Yield the spans and the seconds of each step after the warm-up; the spans are cleared afterwards."""
        for repetition in range(self.repeats + _WARM_UP):
            recorder.is_recording = repetition >= _WARM_UP
            recorder.spans.clear()
            _, seconds = self._timed(step)
            if recorder.is_recording:
                yield list(recorder.spans), seconds

    def _stepper(self, micro_batch: int) -> tuple[Stepper, TraceRecorder, Callable[[], object]]:
        """Return a stepper, its recorder, and a function that runs one step."""
        recorder = TraceRecorder(nvtx=False)
        config, device = self.config, torch.device("cpu")
        alone = Topology()
        groups = ProcessGroups.create(alone, 0, _LIMIT)
        model = Model(config.model)
        initialize_weights(model, seed=0)
        worker = InlineCommunicator(recorder=recorder)
        exchange = build_token_exchange(
            ExchangeConfig(), groups, config.model.n_routed_experts, worker, TrafficCounter(alone, 0)
        )
        stages = StageLayout.build(config.model, config.training.sequence_length)
        policy = config.recompute.recompute_modules
        pipeline = PipelineRuntime.open(stages, groups, device, recorder=recorder, recompute=policy)
        dtype = config.precision.compute_dtype(device)
        stepper = build_stepper(pipeline, model, exchange, dtype, 1, config.optimizer)
        window = config.training.sequence_length + 1 + config.model.num_nextn_predict_layers
        tokens_BW = torch.randint(0, config.model.vocab_size, (micro_batch, window))
        settings = StepSettings(
            learning_rate=1e-4,
            clip_norm=1.0,
            seq_aux_loss_coeff=1e-4,
            mtp_loss_scaling_factor=0.3,
            router_bias_update_rate=0.001,
        )
        batch = TokenBatch(tokens_BW, torch.ones_like(tokens_BW, dtype=torch.bool))
        return stepper, recorder, partial(stepper.step, [batch], micro_batch, settings)

    def _exchanges(self, micro_batch: int, ranks: int) -> dict[ExchangeOperation, float]:
        """Return the seconds of the four operations over `ranks` ranks, from the call to the arrival of the result."""
        config, model, device = self.config, self.config.model, torch.device("cpu")
        groups = self._exchange_groups(ranks)
        worker = build_async_communicator(groups.ep, device)
        exchange = build_token_exchange(
            config.exchange, groups, model.n_routed_experts, worker, TrafficCounter(groups.topology, groups.rank)
        )
        tokens = micro_batch * config.training.sequence_length
        dtype = config.precision.compute_dtype(device)
        tokens_TD, grad_TD = (torch.randn(tokens, model.hidden_size).to(dtype) for _ in range(2))
        weights_TK = torch.rand(tokens, model.num_experts_per_tok)
        experts_TK = torch.rand(tokens, model.n_routed_experts).topk(model.num_experts_per_tok).indices
        inputs = DispatchInputs(tokens_TD, weights_TK, experts_TK, grad_TD)
        times = [
            time_exchange_operations(exchange, inputs, ExchangeLabel("calibrate", repetition), self._timed)
            for repetition in range(self.repeats + _WARM_UP)
        ]
        worker.close()
        return dict(zip(ExchangeOperation, map(median, zip(*times[_WARM_UP:], strict=True)), strict=True))

    def _timed(self, work: Callable[[], T]) -> tuple[T, float]:
        self.groups.world.barrier("an operation to time")
        start = time.perf_counter()
        result = work()
        return result, time.perf_counter() - start

    def _message(self, micro_batch: int) -> float:
        """Return the seconds of a hidden state from one rank to the next, half of a round trip."""
        world, model = self.groups.world, self.config.model
        if world.size == 1:
            return 0.0
        hidden_BSD = torch.zeros(micro_batch, self.config.training.sequence_length, model.hidden_size)
        first, other = world.ranks[0], world.ranks[1]
        times = []
        for _ in range(self.repeats + _WARM_UP):
            world.barrier("a message to time")
            start = time.perf_counter()
            if world.rank == first:
                dist.send(hidden_BSD, other)
                dist.recv(hidden_BSD, other)
            elif world.rank == other:
                dist.recv(hidden_BSD, first)
                dist.send(hidden_BSD, first)
            times.append((time.perf_counter() - start) / 2)
        return median(times[_WARM_UP:]) if world.rank in (first, other) else 0.0

    def _updates(self) -> Iterator[KernelMeasurement]:
        """Yield nanoseconds per parameter of the optimizer and of an all-reduce, and the rest of a step."""
        stepper, recorder, step = self._stepper(1)
        count = sum(parameter.numel() for parameter in stepper.model.parameters())
        update, rest = [], []
        for spans, whole in self._timed_steps(recorder, step):
            top = [span for span in spans if span.track is TimelineTrack.INSTRUCTION]
            update.append(sum(_length(span) for span in top if span.name in (OPTIMIZER, GRADIENT_SYNC_WAIT)))
            rest.append(whole - sum(map(_length, top)))
        # The small reduction has the size of expert loads and router biases.
        small = torch.zeros(2 * self.config.model.num_hidden_layers * self.config.model.n_routed_experts)
        large = torch.zeros(count)
        world = self.groups.world

        def seconds_of_sum(tensor: Tensor) -> float:
            return median(
                self._timed(lambda: world.all_reduce_sum(tensor, "sum to time"))[1] for _ in range(self.repeats)
            )

        small_seconds, large_seconds = seconds_of_sum(small), seconds_of_sum(large)
        yield self._row("phase", "step", "any", median(rest) + _COLLECTIVES_PER_STEP * small_seconds)
        yield self._row("phase", "optimizer", "any", median(update) / count * 1e3)  # per thousand parameters
        yield self._row("phase", "reduce", "any", large_seconds / count * 1e3)


def phase_seconds_from_spans(spans: Sequence[Span], config: RunConfig) -> dict[str, float]:
    """Return the seconds of each phase of one layer, and of the rest of a chunk, from a step of one micro-batch."""
    depth = config.model.num_nextn_predict_layers
    named: defaultdict[str, list[Span]] = defaultdict(list)
    for span in sorted(spans, key=lambda span: span.begin):
        named[span.name].append(span)
    waits = named.pop(EXPOSED_ALL_TO_ALL, [])

    def mean(name: str) -> float:
        found = named[name]
        waited = sum(_length(wait) for wait in waits if any(f.begin <= wait.begin < f.end for f in found))
        return (sum(map(_length, found)) - waited) / len(found) if found else 0.0

    # A flush computes what is pending: the weight gradients of one layer's attention, and of parts around it. Flushes
    # of attention alone give its time, which is subtracted from the others.
    flushes = list(zip(_parts_by_flush(config.model), map(_length, named["attn(W)"]), strict=True))
    alone = [seconds for parts, seconds in flushes if parts.keys() == {LayerPart.ATTENTION}]
    attention = sum(alone) / len(alone) if alone else flushes[-1][1]

    def weight_gradient(part: LayerPart) -> float:
        found = [(parts, seconds) for parts, seconds in flushes if part in parts]
        own = sum(max(0.0, seconds - parts[LayerPart.ATTENTION] * attention) for parts, seconds in found)
        return own / max(1, sum(parts[part] for parts, _ in found))

    phases = {
        ComputePhase.ATTENTION_F: mean("attn(F)"),
        ComputePhase.ATTENTION_B: mean("attn(B)"),
        ComputePhase.ATTENTION_W: attention,
        ComputePhase.SHARED_EXPERTS_F: 0.0,
        ComputePhase.SHARED_EXPERTS_B: 0.0,
        ComputePhase.ROUTED_EXPERTS_F: mean("mlp(F)"),
        ComputePhase.ROUTED_EXPERTS_B: mean("mlp(B)"),
        ComputePhase.EXPERTS_W: mean("mlp(W)"),
        ComputePhase.DENSE_LAYER_F: mean("dense(F)"),
        ComputePhase.DENSE_LAYER_B: mean("dense(B)"),
        ComputePhase.DENSE_LAYER_W: weight_gradient(LayerPart.DENSE_LAYER),
        ComputePhase.HEAD_F: mean("loss(F)"),
        ComputePhase.HEAD_W: 0.0,  # computed in the forward, with the loss
        ComputePhase.MTP_MERGE_W: weight_gradient(LayerPart.MTP_MERGE),
    }
    rest = {op: _rest(named[op], spans) for op in ("F", "B")}
    # The losses' backward and MTP's merge are in no phase; the last stage has both.
    phases |= {
        ComputePhase.MTP_MERGE_F: rest["F"] / max(depth, 1),
        ComputePhase.MTP_MERGE_B: 0.0,
        ComputePhase.HEAD_B: rest["B"] / (1 + depth),
    }
    return {phase.value: seconds for phase, seconds in phases.items()}


class _FlushRecorder(ChunkInterpreter, MoELayerInterpreter):
    """Interpreter of a backward that counts the parts whose weight gradients each flush of attention computes."""

    def __init__(self) -> None:
        self.parts_by_flush: list[Counter[LayerPart]] = []
        self._pending = Counter[LayerPart]()

    @override
    def compute(self, part: LayerPart, index: int = 0) -> None:
        # Losses compute their weights' gradients in the forward, norms theirs with the inputs'.
        if part not in (LayerPart.LOSS, LayerPart.FINAL_NORM):
            self._pending[part] += 1

    @override
    def moe_layer(self, place: int) -> MoELayerInterpreter:
        return self

    @override
    def launch(self, exchange: ExchangeOperation) -> None:
        return

    @override
    def wait(self, exchange: ExchangeOperation) -> None:
        return

    @override
    def flush_weight_gradients(self, part: LayerPart) -> None:
        if part is LayerPart.ATTENTION and self._pending:  # the runtime records no empty flush
            self.parts_by_flush.append(self._pending)
        self._pending = Counter()


def _parts_by_flush(model: ModelConfig) -> list[Counter[LayerPart]]:
    """Return the parts of each span `attn(W)` of the whole model's backward, in order."""
    whole = StageShape(model.first_k_dense_replace, model.num_moe_layers, is_first=True, is_last=True)
    recorder = _FlushRecorder()
    run_to_completion(walk_backward(whole, model.num_nextn_predict_layers, recorder))
    return recorder.parts_by_flush


def _rest(instructions: Sequence[Span], spans: Sequence[Span]) -> float:
    """Return the seconds of the instructions outside of phases and token dispatches."""
    inner = [
        span
        for span in spans
        if span.track in (TimelineTrack.COMPUTE, TimelineTrack.EXCHANGE) and span.name != EXPOSED_ALL_TO_ALL
    ]
    left = 0.0
    for whole in instructions:
        left += _length(whole) - sum(_length(s) for s in inner if whole.begin <= s.begin and s.end <= whole.end)
    return left


def _length(span: Span) -> float:
    return (span.end - span.begin) / 1e9
