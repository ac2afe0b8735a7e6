"""Two lanes of one rank, computing and exchanging, and the five-phase chunks that run on them.

The chunks are generators that yield where the runtime's do (`trainer/model/chunk.py`) and take turns by the runtime's
own `interleave`; only that nothing is computed and a clock goes on instead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ...comm.trace import EXPOSED_ALL_TO_ALL, TimelineTrack
from ...parallelism.pipeline.executor import Resumable, interleave, run_to_completion
from ...trainer.memory.chunk import StageShape
from .compute_time import ComputeTimeModel
from .exchange_time import ExchangeOperation, ExchangeTime, ExchangeTimeModel
from .kernel_times import EvidenceCoverage
from .operations import ComputePhase, LayerWorkload
from .recipe import PeerWaits


@dataclass
class _Flight:
    """An exchange under way: seconds of waiting for others, then the share that has still to travel."""

    travel: ExchangeTime
    sync: float
    left: float = 1.0
    begun: float | None = None
    done: bool = False


@dataclass(frozen=True)
class StreamSpan:
    """What ran on a lane, in seconds from the chunk's beginning."""

    track: TimelineTrack
    name: str
    begin: float
    end: float


@dataclass
class SimulatedStreams:
    """The clock of a rank: computing and waiting move it on, and exchanges travel in the order of their launch."""

    elapsed_seconds: float = 0.0
    exposed_seconds: float = 0.0
    """Seconds of waiting for exchanges."""
    exchange_seconds: float = 0.0
    """Seconds in which an exchange was under way."""
    overlapped_gap_seconds: float = 0.0
    """Of the gaps between kernels, those beside an exchange: no kernel runs but the exchange's."""
    spans: list[StreamSpan] = field(default_factory=list)
    _queue: deque[_Flight] = field(default_factory=deque)

    def run_compute(self, phase: ComputePhase, seconds: float, gaps: float = 0.0) -> None:
        """Compute, while exchanges travel at the pace they have beside computing."""
        if seconds == 0:
            return
        begin, end, traveled = self.elapsed_seconds, self.elapsed_seconds + seconds, self.exchange_seconds
        while self._queue and self._need(beside=True) <= end - self.elapsed_seconds:
            self._arrive(self._need(beside=True))
        if self._queue:
            self._travel(end - self.elapsed_seconds)
        self.elapsed_seconds = end
        self.overlapped_gap_seconds += gaps * (self.exchange_seconds - traveled) / seconds
        self.spans.append(StreamSpan(TimelineTrack.COMPUTE, phase.value, begin, self.elapsed_seconds))

    def launch_exchange(self, travel: ExchangeTime, sync: float = 0.0) -> _Flight:
        """Start an exchange; once those before it have arrived it waits `sync` for other ranks, and travels."""
        flight = _Flight(travel, sync)
        self._queue.append(flight)
        return flight

    def wait_for_exchange(self, flight: _Flight) -> None:
        """Until it has arrived, at the pace that exchanges have alone."""
        begin = self.elapsed_seconds
        while not flight.done:
            self._arrive(self._need(beside=False))
        if self.elapsed_seconds > begin:
            self.exposed_seconds += self.elapsed_seconds - begin
            self.spans.append(StreamSpan(TimelineTrack.COMPUTE, EXPOSED_ALL_TO_ALL, begin, self.elapsed_seconds))

    def _need(self, *, beside: bool) -> float:
        """Seconds that the first exchange still takes."""
        head = self._queue[0]
        return head.sync + head.left * (head.travel.overlapped_seconds if beside else head.travel.standalone_seconds)

    def _travel(self, seconds: float) -> None:
        """The first exchange goes on for so long beside computing, and has not arrived then."""
        head = self._queue[0]
        head.begun = self.elapsed_seconds if head.begun is None else head.begun
        synced = min(seconds, head.sync)
        head.sync -= synced
        if seconds > synced:
            head.left -= (seconds - synced) / head.travel.overlapped_seconds
        self.exchange_seconds += seconds

    def _arrive(self, seconds: float) -> None:
        """The first exchange arrives after so long."""
        head = self._queue.popleft()
        begun = self.elapsed_seconds if head.begun is None else head.begun
        self.elapsed_seconds += seconds
        self.exchange_seconds += seconds
        head.done = True
        self.spans.append(StreamSpan(TimelineTrack.EXCHANGE, head.travel.name, begun, self.elapsed_seconds))


BackwardFunction = Callable[[bool], Resumable[None]]
"""Given whether weight gradients are computed along with those of inputs."""


@dataclass(frozen=True)
class SimulatedChunk:
    """The chunk of a stage on `lanes`. A new one for each simulation."""

    stage: StageShape
    shape: LayerWorkload
    compute_model: ComputeTimeModel
    exchange_model: ExchangeTimeModel
    streams: SimulatedStreams
    wait_for_peers: bool
    """Whether exchanges wait for other ranks, as they do in the trace, which is of two chunks beside each other."""
    routed_rows_by_layer: tuple[int, ...] = ()
    """That reach the experts of each layer, in the order in which the layers run, where a trace says so."""

    def forward(self) -> Resumable[None]:
        """All layers, in the last stage MTP modules and losses too."""
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
        """The opposite way. As in the runtime a layer's attention weights wait for the next layer's exchange."""
        left: list[ComputePhase] = []

        def settle(layer: int | None = None) -> None:
            if with_weight_gradients:
                for phase in left:
                    self._compute(phase)
                if layer is not None:
                    self._compute(ComputePhase.EXPERTS_W, layer)
            left.clear()

        if self.stage.is_last:
            for _ in range(self.shape.model.num_nextn_predict_layers + 1):
                self._compute(ComputePhase.HEAD_B)
                left.append(ComputePhase.HEAD_W)
            for depth in range(self.shape.model.num_nextn_predict_layers):
                yield from self._moe_backward(depth, left, settle)
                self._compute(ComputePhase.MTP_MERGE_B)
                left.append(ComputePhase.MTP_MERGE_W)
        first = self.shape.model.num_nextn_predict_layers if self.stage.is_last else 0
        for layer in range(first, first + self.stage.moe_layers):
            yield from self._moe_backward(layer, left, settle)
        for _ in range(self.stage.dense_layers):
            self._compute(ComputePhase.DENSE_LAYER_B)
            left.append(ComputePhase.DENSE_LAYER_W)
        settle()

    def weight_gradients(self) -> None:
        """What an I has left for its W."""
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
        in_turns = yield
        if in_turns:  # the second part of the dispatch is launched, behind the first without a gap
            yield
        self._compute(ComputePhase.SHARED_EXPERTS_F)
        self.streams.wait_for_exchange(dispatched)
        self._compute(ComputePhase.ROUTED_EXPERTS_F, layer)
        combined = self._launch(ExchangeOperation.COMBINE, layer)
        yield
        self.streams.wait_for_exchange(combined)

    def _moe_backward(self, layer: int, left: list[ComputePhase], settle: Callable[..., None]) -> Resumable[None]:
        uncombined = self._launch(ExchangeOperation.COMBINE_BACKWARD, layer)
        settle()
        in_turns = yield
        self._compute(ComputePhase.SHARED_EXPERTS_B)
        self.streams.wait_for_exchange(uncombined)
        self._compute(ComputePhase.ROUTED_EXPERTS_B, layer)
        if in_turns:
            yield
        undispatched = self._launch(ExchangeOperation.DISPATCH_BACKWARD, layer)
        settle(layer)
        yield
        self.streams.wait_for_exchange(undispatched)
        self._compute(ComputePhase.ATTENTION_B)
        left.append(ComputePhase.ATTENTION_W)

    def _compute(self, phase: ComputePhase, layer: int | None = None) -> None:
        shape = self.shape
        if layer is not None and self.routed_rows_by_layer:
            shape = replace(shape, traced_rows=self.routed_rows_by_layer[layer % len(self.routed_rows_by_layer)])
        self.streams.run_compute(
            phase, self.compute_model.phase_seconds(shape, phase), self.compute_model.gap_seconds(phase)
        )

    def _launch(self, exchange: ExchangeOperation, layer: int) -> _Flight:
        travel = self.exchange_model.exchange_time(self.shape, exchange)
        return self.streams.launch_exchange(
            travel,
            travel.peer_wait_seconds_by_layer[layer % len(travel.peer_wait_seconds_by_layer)]
            if self.wait_for_peers
            else 0.0,
        )


@dataclass(frozen=True)
class ChunkTimeModel:
    """How long the instructions of a program take, by what the stages hold."""

    shape: LayerWorkload
    compute_model: ComputeTimeModel
    exchange_model: ExchangeTimeModel
    _lanes: dict[tuple[str, StageShape | None, StageShape | None], SimulatedStreams] = field(default_factory=dict)

    def with_separate_coverage(self) -> ChunkTimeModel:
        """The same prices, counted in no coverage but their own."""
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
        """The lanes after one instruction: `op` is F, B, I, W or FB."""
        key = op, forward, backward
        if key not in self._lanes:
            self._lanes[key] = self._run(*key)
        return self._lanes[key]

    def _run(self, op: str, forward: StageShape | None, backward: StageShape | None) -> SimulatedStreams:
        lanes = SimulatedStreams()
        sync = self.compute_model.recipe.peer_waits
        in_turns = op == "FB" and self.compute_model.recipe.overlap
        waits = sync is PeerWaits.EVERYWHERE or (sync is PeerWaits.OVERLAPPED_PAIRS and in_turns)
        ahead = None if forward is None else self._chunk(forward, lanes, waits).forward()
        if backward is None:
            assert ahead is not None
            run_to_completion(ahead)
        elif op == "W":
            self._chunk(backward, lanes, waits).weight_gradients()
        elif ahead is None:
            run_to_completion(self._chunk(backward, lanes, waits).backward(op == "B"))
        elif in_turns:
            interleave(self._chunk(backward, lanes, waits).backward(True), ahead)
        else:  # as the executor does without `schedule.overlap`
            run_to_completion(ahead)
            run_to_completion(self._chunk(backward, lanes, waits).backward(True))
        return lanes

    def _chunk(self, stage: StageShape, lanes: SimulatedStreams, waits: bool) -> SimulatedChunk:
        return SimulatedChunk(stage, self.shape, self.compute_model, self.exchange_model, lanes, waits)

    def compute_seconds(self, stage: StageShape) -> float:
        """Forward and whole backward of one micro-batch without any waiting: no order of things can be faster."""
        return sum(
            self.simulate_instruction(op, forward, backward).elapsed_seconds for op, forward, backward in _alone(stage)
        ) - sum(
            self.simulate_instruction(op, forward, backward).exposed_seconds for op, forward, backward in _alone(stage)
        )


def _alone(stage: StageShape) -> tuple[tuple[str, StageShape | None, StageShape | None], ...]:
    return ("F", stage, None), ("B", None, stage)
