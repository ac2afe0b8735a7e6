"""Simulation of one rank's compute and exchange streams, and the five-phase chunks that run on them.

The chunks are generators that yield where the runtime's do (`trainer/model/chunk.py`), and the runtime's `interleave`
schedules them. They advance a clock instead of computing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ...comm.trace import EXPOSED_ALL_TO_ALL, TimelineTrack
from ...parallelism.pipeline.instruction import Resumable, interleave, run_to_completion
from ...trainer.memory.chunk import StageShape
from .compute_time import ComputeTimeModel
from .exchange_time import ExchangeOperation, ExchangeTime, ExchangeTimeModel
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
    shape: LayerWorkload
    compute_model: ComputeTimeModel
    exchange_model: ExchangeTimeModel
    streams: SimulatedStreams
    wait_for_peers: bool
    """True: exchanges wait for other ranks, as in the public trace of an overlapped forward and backward chunk."""
    routed_rows_by_layer: tuple[int, ...] = ()
    """Rows that reach the experts of each layer, in execution order; empty: the balanced number."""

    def forward(self) -> Resumable[None]:
        """Run all layers; the last stage adds the MTP modules and the losses."""
        for _ in range(self.stage.dense_layers):
            self._compute(ComputePhase.DENSE_LAYER_F)
        for layer in range(self.stage.moe_layers):
            yield from self._moe_forward(layer)
        if self.stage.is_last:
            self._compute(ComputePhase.HEAD_F)
            for depth in range(self.shape.model.num_nextn_predict_layers):
                self._compute(ComputePhase.MTP_MERGE_F)
                yield from self._moe_forward(self.stage.moe_layers + depth)
                self._compute(ComputePhase.HEAD_F)

    def backward(self, with_weight_gradients: bool) -> Resumable[None]:
        """Run the layers in reverse order."""
        # As in the runtime, attention's weight gradients (2.4 ms per layer in the trace) run during the next layer's
        # exchange, which would otherwise be exposed.
        delayed: list[ComputePhase] = []

        def flush(layer: int | None = None) -> None:
            if with_weight_gradients:
                for phase in delayed:
                    self._compute(phase)
                if layer is not None:
                    self._compute(ComputePhase.EXPERTS_W, layer)
            delayed.clear()

        if self.stage.is_last:
            for _ in range(self.shape.model.num_nextn_predict_layers + 1):
                self._compute(ComputePhase.HEAD_B)
                delayed.append(ComputePhase.HEAD_W)
            for depth in range(self.shape.model.num_nextn_predict_layers):
                yield from self._moe_backward(depth, delayed, flush)
                self._compute(ComputePhase.MTP_MERGE_B)
                delayed.append(ComputePhase.MTP_MERGE_W)
        first = self.shape.model.num_nextn_predict_layers if self.stage.is_last else 0
        for layer in range(first, first + self.stage.moe_layers):
            yield from self._moe_backward(layer, delayed, flush)
        for _ in range(self.stage.dense_layers):
            self._compute(ComputePhase.DENSE_LAYER_B)
            delayed.append(ComputePhase.DENSE_LAYER_W)
        flush()

    def weight_gradients(self) -> None:
        """Compute the weight gradients that an I instruction delays to its W."""
        depth = self.shape.model.num_nextn_predict_layers if self.stage.is_last else 0
        for phase, times in (
            (ComputePhase.EXPERTS_W, self.stage.moe_layers + depth),
            (ComputePhase.ATTENTION_W, self.stage.moe_layers + depth),
            (ComputePhase.DENSE_LAYER_W, self.stage.dense_layers),
            (ComputePhase.HEAD_W, depth + 1 if self.stage.is_last else 0),
            (ComputePhase.MTP_MERGE_W, depth),
        ):
            for _ in range(times):
                self._compute(phase)

    def _moe_forward(self, layer: int) -> Resumable[None]:
        self._compute(ComputePhase.ATTENTION_F)
        dispatched = self._launch(ExchangeOperation.DISPATCH, layer)
        overlapped = yield
        # The published trace's order: dispatch(F) hides behind mlp(B), and combine(F) behind attn(B).
        if overlapped:  # the second part of the dispatch is launched, behind the first without a gap
            yield
        self._compute(ComputePhase.SHARED_EXPERTS_F)
        self.streams.wait_for_exchange(dispatched)
        self._compute(ComputePhase.ROUTED_EXPERTS_F, layer)
        combined = self._launch(ExchangeOperation.COMBINE, layer)
        yield
        self.streams.wait_for_exchange(combined)

    def _moe_backward(self, layer: int, delayed: list[ComputePhase], flush: Callable[..., None]) -> Resumable[None]:
        uncombined = self._launch(ExchangeOperation.COMBINE_BACKWARD, layer)
        flush()
        overlapped = yield
        self._compute(ComputePhase.SHARED_EXPERTS_B)
        self.streams.wait_for_exchange(uncombined)
        self._compute(ComputePhase.ROUTED_EXPERTS_B, layer)
        if overlapped:
            yield
        undispatched = self._launch(ExchangeOperation.DISPATCH_BACKWARD, layer)
        flush(layer)
        yield
        self.streams.wait_for_exchange(undispatched)
        self._compute(ComputePhase.ATTENTION_B)
        delayed.append(ComputePhase.ATTENTION_W)

    def _compute(self, phase: ComputePhase, layer: int | None = None) -> None:
        shape = self.shape
        if layer is not None and self.routed_rows_by_layer:
            shape = replace(shape, traced_rows=self.routed_rows_by_layer[layer % len(self.routed_rows_by_layer)])
        self.streams.run_compute(
            phase, self.compute_model.phase_seconds(shape, phase), self.compute_model.gap_seconds(phase)
        )

    def _launch(self, exchange: ExchangeOperation, layer: int) -> _InFlightExchange:
        travel = self.exchange_model.exchange_time(self.shape, exchange)
        return self.streams.launch_exchange(
            travel,
            travel.peer_wait_seconds_by_layer[layer % len(travel.peer_wait_seconds_by_layer)]
            if self.wait_for_peers
            else 0.0,
        )


@dataclass(frozen=True)
class ChunkTimeModel:
    """Times of a program's instructions, by the contents of their stages."""

    shape: LayerWorkload
    compute_model: ComputeTimeModel
    exchange_model: ExchangeTimeModel
    _simulated: dict[tuple[str, StageShape | None, StageShape | None], SimulatedStreams] = field(default_factory=dict)

    def with_separate_coverage(self) -> ChunkTimeModel:
        """Return a model with the same prices and a separate, empty coverage."""
        coverage = EvidenceCoverage(strongest_evidence=self.compute_model.coverage.strongest_evidence)
        cost = ComputeTimeModel(
            self.compute_model.cluster, self.compute_model.recipe, self.compute_model.table, coverage
        )
        return ChunkTimeModel(
            self.shape,
            cost,
            ExchangeTimeModel(
                self.exchange_model.cluster, self.exchange_model.recipe, self.exchange_model.table, coverage
            ),
        )

    def simulate_instruction(
        self, op: str, forward: StageShape | None, backward: StageShape | None
    ) -> SimulatedStreams:
        """Return the streams after one instruction; `op` is F, B, I, W or FB."""
        key = op, forward, backward
        if key not in self._simulated:
            self._simulated[key] = self._run(*key)
        return self._simulated[key]

    def _run(self, op: str, forward: StageShape | None, backward: StageShape | None) -> SimulatedStreams:
        streams = SimulatedStreams()
        sync = self.compute_model.recipe.peer_waits
        overlapped = op == "FB" and self.compute_model.recipe.overlap
        # Waits for peers are 28 % of the exchange stream in the trace (32.6 of 114.5 ms). The trace holds overlapped
        # pairs only, so nothing is known about waits of a lone F or B.
        waits = sync is PeerWaits.EVERYWHERE or (sync is PeerWaits.OVERLAPPED_PAIRS and overlapped)
        ahead = None if forward is None else self._chunk(forward, streams, waits).forward()
        if backward is None:
            assert ahead is not None
            run_to_completion(ahead)
        elif op == "W":
            self._chunk(backward, streams, waits).weight_gradients()
        elif ahead is None:
            run_to_completion(self._chunk(backward, streams, waits).backward(op == "B"))
        elif overlapped:
            interleave(self._chunk(backward, streams, waits).backward(True), ahead)
        else:  # the executor's order without `schedule.overlap`
            run_to_completion(ahead)
            run_to_completion(self._chunk(backward, streams, waits).backward(True))
        return streams

    def _chunk(self, stage: StageShape, streams: SimulatedStreams, waits: bool) -> SimulatedChunk:
        return SimulatedChunk(stage, self.shape, self.compute_model, self.exchange_model, streams, waits)

    def compute_seconds(self, stage: StageShape) -> float:
        """Seconds of forward and full backward of one micro-batch without waiting, a lower bound of every schedule."""
        lone = (("F", stage, None), ("B", None, stage))
        streams = [self.simulate_instruction(op, forward, backward) for op, forward, backward in lone]
        return sum(each.elapsed_seconds for each in streams) - sum(each.exposed_seconds for each in streams)
