"""Simulation of one rank's compute and exchange streams, and the chunks that run on them.

The chunks follow the runtime's order of steps (`parallelism/pipeline/chunk_walk.py`) and run as its instructions do
(`run_instruction`). They advance a clock instead of computing.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property

from typing_extensions import override

from ...comm.trace import EXPOSED_ALL_TO_ALL, TimelineTrack
from ...parallelism.pipeline.chunk_walk import (
    ChunkInterpreter,
    ExchangeOperation,
    LayerPart,
    MoELayerInterpreter,
    StageShape,
    phase_name,
    walk_backward,
    walk_forward,
)
from ...parallelism.pipeline.instruction import Resumable, run_instruction, run_to_completion
from ...parallelism.pipeline.program import Op
from .compute_time import ComputeTimeModel
from .exchange_time import ExchangeTime, ExchangeTimeModel
from .kernel_times import EvidenceCoverage
from .operations import ComputePhase, LayerWorkload
from .recipe import PeerWaits


@dataclass
class _InFlightExchange:
    """An exchange in flight: seconds left of the wait for other ranks, then the fraction left to transfer."""

    travel: ExchangeTime
    sync: float
    fraction_left: float = 1.0
    start: float | None = None
    done: bool = False


@dataclass(frozen=True)
class StreamSpan:
    """One operation on a stream; times in seconds from the start of the instruction."""

    track: TimelineTrack
    name: str
    begin: float
    end: float


@dataclass
class SimulatedStreams:
    """Clock of one rank: computing and waiting advance it; exchanges complete in launch order."""

    elapsed_seconds: float = 0.0
    exposed_seconds: float = 0.0
    """Seconds of waiting for exchanges."""
    exchange_seconds: float = 0.0
    """Seconds in which an exchange was under way."""
    overlapped_gap_seconds: float = 0.0
    """Seconds of launch gaps that overlap an exchange: the exchange's kernel is the only one that runs."""
    spans: list[StreamSpan] = field(default_factory=list)
    _queue: deque[_InFlightExchange] = field(default_factory=deque)

    def run_compute(self, phase: ComputePhase, seconds: float, gaps: float = 0.0) -> None:
        """Advance the clock by `seconds` of computing, and in-flight exchanges at their overlapped speed."""
        if seconds == 0:
            return
        # Computing is not slowed by an exchange: in the public trace grids are 112 of 132 SMs throughout, and attn(W)
        # takes 2,405 us alone and 2,375 to 2,392 us during an exchange.
        begin, end, traveled = self.elapsed_seconds, self.elapsed_seconds + seconds, self.exchange_seconds
        while self._queue and self._oldest_seconds_left(overlapped=True) <= end - self.elapsed_seconds:
            self._complete_oldest(self._oldest_seconds_left(overlapped=True))
        if self._queue:
            self._advance_oldest(end - self.elapsed_seconds)
        self.elapsed_seconds = end
        self.overlapped_gap_seconds += gaps * (self.exchange_seconds - traveled) / seconds
        self.spans.append(StreamSpan(TimelineTrack.COMPUTE, phase.value, begin, self.elapsed_seconds))

    def launch_exchange(self, travel: ExchangeTime, sync: float = 0.0) -> _InFlightExchange:
        """Start an exchange. After earlier ones complete it waits `sync` seconds for other ranks, then transfers."""
        flight = _InFlightExchange(travel, sync)
        self._queue.append(flight)
        return flight

    def wait_for_exchange(self, flight: _InFlightExchange) -> None:
        """Advance the clock until `flight` completes, at the speed of an exchange without computing."""
        begin = self.elapsed_seconds
        while not flight.done:
            self._complete_oldest(self._oldest_seconds_left(overlapped=False))
        if self.elapsed_seconds > begin:
            self.exposed_seconds += self.elapsed_seconds - begin
            self.spans.append(StreamSpan(TimelineTrack.COMPUTE, EXPOSED_ALL_TO_ALL, begin, self.elapsed_seconds))

    def _oldest_seconds_left(self, *, overlapped: bool) -> float:
        """Seconds left of the oldest in-flight exchange."""
        head = self._queue[0]
        transfer = head.travel.overlapped_seconds if overlapped else head.travel.standalone_seconds
        return head.sync + head.fraction_left * transfer

    def _advance_oldest(self, seconds: float) -> None:
        """Advance the oldest in-flight exchange by `seconds` of overlapped computing; it does not complete."""
        head = self._queue[0]
        head.start = self.elapsed_seconds if head.start is None else head.start
        synced = min(seconds, head.sync)
        head.sync -= synced
        if seconds > synced:
            head.fraction_left -= (seconds - synced) / head.travel.overlapped_seconds
        self.exchange_seconds += seconds

    def _complete_oldest(self, seconds: float) -> None:
        """Complete the oldest in-flight exchange after `seconds`."""
        head = self._queue.popleft()
        start = self.elapsed_seconds if head.start is None else head.start
        self.elapsed_seconds += seconds
        self.exchange_seconds += seconds
        head.done = True
        self.spans.append(StreamSpan(TimelineTrack.EXCHANGE, head.travel.name, start, self.elapsed_seconds))


@dataclass(frozen=True)
class SimulatedChunk:
    """Chunk of one stage on `streams`, for one simulation."""

    stage: StageShape
    costs: "ChunkTimeModel"
    streams: SimulatedStreams
    wait_for_peers: bool
    """True: exchanges wait for other ranks, as in the public trace of an overlapped forward and backward chunk."""
    routed_rows_by_layer: tuple[int, ...] = ()
    """Rows that reach the experts of each layer, in execution order; empty: the balanced number."""

    def forward(self) -> Resumable[None]:
        """Run all layers; the last stage adds the MTP modules and the losses."""
        return walk_forward(self.stage, self._mtp_modules, _TimedWalk(self, Op.F))

    def backward(self, *, deferred: bool) -> Resumable[None]:
        """Run the layers in reverse order, with their weight gradients unless these are `deferred`."""
        return walk_backward(self.stage, self._mtp_modules, _TimedWalk(self, Op.B, deferred=deferred))

    def weight_gradients(self) -> None:
        """Compute the weight gradients that a deferred backward leaves."""
        left = _TimedWalk(replace(self, streams=SimulatedStreams()), Op.B, deferred=True)
        run_to_completion(walk_backward(self.stage, self._mtp_modules, left))
        for phase, turn in left.pending:
            self.run_compute(phase, turn)

    @property
    def moe_layers(self) -> int:
        """Number of MoE layers, those of the MTP modules included."""
        return self.stage.moe_layers + (self._mtp_modules if self.stage.is_last else 0)

    @property
    def _mtp_modules(self) -> int:
        return self.costs.shape.model.num_nextn_predict_layers

    def run_compute(self, phase: ComputePhase, turn: int | None) -> None:
        """Compute a phase; `turn` is the number of a phase of routed experts, whose rows may differ by layer."""
        shape, costs = self.costs.shape, self.costs.compute_model
        if turn is not None and self.routed_rows_by_layer:
            shape = replace(shape, traced_rows=self.routed_rows_by_layer[turn % len(self.routed_rows_by_layer)])
        self.streams.run_compute(phase, costs.phase_seconds(shape, phase), costs.gap_seconds(phase))

    def launch(self, exchange: ExchangeOperation, turn: int) -> _InFlightExchange:
        """Launch an exchange of the MoE layer that has this number in execution order."""
        travel = self.costs.exchange_model.exchange_time(self.costs.shape, exchange)
        waits = travel.peer_wait_seconds_by_layer
        return self.streams.launch_exchange(travel, waits[turn % len(waits)] if self.wait_for_peers else 0.0)


_PHASES = {phase.value: phase for phase in ComputePhase}
"""Phases that take time; embedding, final norm and merge take none, and routed experts' W includes the shared one's."""


class _TimedWalk(ChunkInterpreter):
    """One direction of a chunk, `op` F or B, in seconds."""

    def __init__(self, chunk: SimulatedChunk, op: Op, *, deferred: bool = False) -> None:
        self.chunk, self._op, self._deferred = chunk, op, deferred
        self.pending: list[tuple[ComputePhase, int | None]] = []
        """Weight gradients that are not computed yet."""

    @override
    def compute(self, part: LayerPart, index: int) -> None:
        self.run(part, None)

    def run(self, part: LayerPart, turn: int | None) -> None:
        """Compute a part; `turn` as for `SimulatedChunk.run_compute`."""
        if (phase := _PHASES.get(phase_name(part, self._op))) is not None:
            self.chunk.run_compute(phase, turn)
        if self._op is Op.B and (weights := _PHASES.get(phase_name(part, Op.W))) is not None:
            self.pending.append((weights, turn))

    @override
    def moe_layer(self, place: int) -> MoELayerInterpreter:
        # Waits for peers and traced rows are recorded per layer in execution order, which a backward reverses.
        turn = place - self.chunk.stage.dense_layers
        return _TimedLayer(self, turn if self._op is Op.F else self.chunk.moe_layers - 1 - turn)

    @override
    def flush_weight_gradients(self, part: LayerPart) -> None:
        if not self._deferred:
            for phase, turn in self.pending:
                self.chunk.run_compute(phase, turn)
            self.pending.clear()


class _TimedLayer(MoELayerInterpreter):
    """One MoE layer in seconds; `turn` is its number in execution order."""

    # The second part of a dispatch follows the first without a gap: here they are one exchange, launched as one.

    def __init__(self, walk: _TimedWalk, turn: int) -> None:
        self._walk, self._turn = walk, turn
        self._in_flight: dict[ExchangeOperation, _InFlightExchange] = {}

    @override
    def compute(self, part: LayerPart) -> None:
        self._walk.run(part, self._turn if part is LayerPart.ROUTED_EXPERTS else None)

    @override
    def launch(self, exchange: ExchangeOperation) -> None:
        self._in_flight[exchange] = self._walk.chunk.launch(exchange, self._turn)

    @override
    def wait(self, exchange: ExchangeOperation) -> None:
        self._walk.chunk.streams.wait_for_exchange(self._in_flight.pop(exchange))

    @override
    def flush_weight_gradients(self, part: LayerPart) -> None:
        self._walk.flush_weight_gradients(part)


@dataclass(frozen=True)
class ChunkTimeModel:
    """Times of a program's instructions, by the contents of their stages."""

    shape: LayerWorkload
    compute_model: ComputeTimeModel
    exchange_model: ExchangeTimeModel

    def with_separate_coverage(self) -> "ChunkTimeModel":
        """Return a model with the same prices and a separate, empty coverage."""
        coverage = EvidenceCoverage(strongest_evidence=self.compute_model.coverage.strongest_evidence)
        compute = replace(self.compute_model, coverage=coverage)
        return ChunkTimeModel(self.shape, compute, replace(self.exchange_model, coverage=coverage))

    @cached_property
    def simulate_instruction(self) -> Callable[[str, StageShape | None, StageShape | None], SimulatedStreams]:
        """Function that returns the streams after one instruction: op (F, B, I, W or FB), stages forward, backward."""
        return cache(self._run)

    def _run(self, op: str, forward: StageShape | None, backward: StageShape | None) -> SimulatedStreams:
        streams, recipe = SimulatedStreams(), self.compute_model.recipe
        # Waits for peers are 28 % of the exchange stream in the trace (32.6 of 114.5 ms). The trace holds overlapped
        # pairs only, so nothing is known about waits of a lone F or B.
        overlapped = op == Op.FB and recipe.overlap
        waits = recipe.peer_waits is PeerWaits.EVERYWHERE or (
            recipe.peer_waits is PeerWaits.OVERLAPPED_PAIRS and overlapped
        )
        ahead, back = (
            None if stage is None else SimulatedChunk(stage, self, streams, waits) for stage in (forward, backward)
        )
        run_instruction(Op(op), ahead, back, overlap=recipe.overlap)
        return streams

    def compute_seconds(self, stage: StageShape) -> float:
        """Seconds of forward and full backward of one micro-batch without waiting, a lower bound of every schedule."""
        streams = [self.simulate_instruction("F", stage, None), self.simulate_instruction("B", None, stage)]
        return sum(each.elapsed_seconds for each in streams) - sum(each.exposed_seconds for each in streams)
