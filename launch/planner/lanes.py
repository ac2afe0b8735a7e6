"""Two lanes of one rank, computing and exchanging, and the five-phase chunks that run on them.

The chunks are generators that yield where the runtime's do (`trainer/model/chunk.py`) and take turns by the runtime's
own `take_turns`; only that nothing is computed and a clock goes on instead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ...comm.trace import EXPOSED_EXCHANGE, Track
from ...parallelism.pipeline.executor import Steps, drive, take_turns
from ...trainer.memory.chunk import StageShape
from .exchange_time import Exchange, ExchangePricer, ExchangeTime
from .kernel_times import Coverage
from .operations import ComputePhase, Shape
from .pricing import Compute
from .recipe import Sync


@dataclass
class _Flight:
    """An exchange under way: seconds of waiting for others, then the share that has still to travel."""

    travel: ExchangeTime
    sync: float
    left: float = 1.0
    begun: float | None = None
    done: bool = False


@dataclass(frozen=True)
class LaneSpan:
    """What ran on a lane, in seconds from the chunk's beginning."""

    track: Track
    name: str
    begin: float
    end: float


@dataclass
class Lanes:
    """The clock of a rank: computing and waiting move it on, and exchanges travel in the order of their launch."""

    now: float = 0.0
    exposed: float = 0.0
    """Seconds of waiting for exchanges."""
    exchanging: float = 0.0
    """Seconds in which an exchange was under way."""
    idle_beside: float = 0.0
    """Of the gaps between kernels, those beside an exchange: no kernel runs but the exchange's."""
    spans: list[LaneSpan] = field(default_factory=list)
    _queue: deque[_Flight] = field(default_factory=deque)

    def compute(self, phase: ComputePhase, seconds: float, gaps: float = 0.0) -> None:
        """Compute, while exchanges travel at the pace they have beside computing."""
        if seconds == 0:
            return
        begin, end, traveled = self.now, self.now + seconds, self.exchanging
        while self._queue and self._need(beside=True) <= end - self.now:
            self._arrive(self._need(beside=True))
        if self._queue:
            self._travel(end - self.now)
        self.now = end
        self.idle_beside += gaps * (self.exchanging - traveled) / seconds
        self.spans.append(LaneSpan(Track.COMPUTE, phase.value, begin, self.now))

    def launch(self, travel: ExchangeTime, sync: float = 0.0) -> _Flight:
        """Start an exchange; once those before it have arrived it waits `sync` for other ranks, and travels."""
        flight = _Flight(travel, sync)
        self._queue.append(flight)
        return flight

    def wait(self, flight: _Flight) -> None:
        """Until it has arrived, at the pace that exchanges have alone."""
        begin = self.now
        while not flight.done:
            self._arrive(self._need(beside=False))
        if self.now > begin:
            self.exposed += self.now - begin
            self.spans.append(LaneSpan(Track.COMPUTE, EXPOSED_EXCHANGE, begin, self.now))

    def _need(self, *, beside: bool) -> float:
        """Seconds that the first exchange still takes."""
        head = self._queue[0]
        return head.sync + head.left * (head.travel.beside if beside else head.travel.alone)

    def _travel(self, seconds: float) -> None:
        """The first exchange goes on for so long beside computing, and has not arrived then."""
        head = self._queue[0]
        head.begun = self.now if head.begun is None else head.begun
        synced = min(seconds, head.sync)
        head.sync -= synced
        if seconds > synced:
            head.left -= (seconds - synced) / head.travel.beside
        self.exchanging += seconds

    def _arrive(self, seconds: float) -> None:
        """The first exchange arrives after so long."""
        head = self._queue.popleft()
        begun = self.now if head.begun is None else head.begun
        self.now += seconds
        self.exchanging += seconds
        head.done = True
        self.spans.append(LaneSpan(Track.EXCHANGE, head.travel.name, begun, self.now))


Backward = Callable[[bool], Steps[None]]
"""Given whether weight gradients are computed along with those of inputs."""


@dataclass(frozen=True)
class SimulatedChunk:
    """The chunk of a stage on `lanes`. A new one for each simulation."""

    stage: StageShape
    shape: Shape
    cost: Compute
    wire: ExchangePricer
    lanes: Lanes
    waits: bool
    """Whether exchanges wait for other ranks, as they do in the trace, which is of two chunks beside each other."""
    rows: tuple[int, ...] = ()
    """That reach the experts of each layer, in the order in which the layers run, where a trace says so."""

    def forward(self) -> Steps[None]:
        """All layers, in the last stage MTP modules and losses too."""
        for _ in range(self.stage.dense):
            self._compute(ComputePhase.DENSE_F)
        for layer in range(self.stage.routed):
            yield from self._moe_forward(layer)
        if self.stage.is_last:
            self._compute(ComputePhase.HEAD_F)
            for depth in range(self.shape.model.num_nextn_predict_layers):
                self._compute(ComputePhase.MERGE_F)
                yield from self._moe_forward(self.stage.routed + depth)
                self._compute(ComputePhase.HEAD_F)

    def backward(self, weights: bool) -> Steps[None]:
        """The opposite way. As in the runtime a layer's attention weights wait for the next layer's exchange."""
        left: list[ComputePhase] = []

        def settle(layer: int | None = None) -> None:
            if weights:
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
                self._compute(ComputePhase.MERGE_B)
                left.append(ComputePhase.MERGE_W)
        first = self.shape.model.num_nextn_predict_layers if self.stage.is_last else 0
        for layer in range(first, first + self.stage.routed):
            yield from self._moe_backward(layer, left, settle)
        for _ in range(self.stage.dense):
            self._compute(ComputePhase.DENSE_B)
            left.append(ComputePhase.DENSE_W)
        settle()

    def weight_gradients(self) -> None:
        """What an I has left for its W."""
        depth = self.shape.model.num_nextn_predict_layers if self.stage.is_last else 0
        for phase, times in (
            (ComputePhase.EXPERTS_W, self.stage.routed + depth),
            (ComputePhase.ATTENTION_W, self.stage.routed + depth),
            (ComputePhase.DENSE_W, self.stage.dense),
            (ComputePhase.HEAD_W, depth + 1 if self.stage.is_last else 0),
            (ComputePhase.MERGE_W, depth),
        ):
            for _ in range(times):
                self._compute(phase)

    def _moe_forward(self, layer: int) -> Steps[None]:
        self._compute(ComputePhase.ATTENTION_F)
        dispatched = self._launch(Exchange.DISPATCH, layer)
        in_turns = yield
        if in_turns:  # the second part of the dispatch is launched, behind the first without a gap
            yield
        self._compute(ComputePhase.SHARED_F)
        self.lanes.wait(dispatched)
        self._compute(ComputePhase.EXPERTS_F, layer)
        combined = self._launch(Exchange.COMBINE, layer)
        yield
        self.lanes.wait(combined)

    def _moe_backward(self, layer: int, left: list[ComputePhase], settle: Callable[..., None]) -> Steps[None]:
        uncombined = self._launch(Exchange.COMBINE_BACKWARD, layer)
        settle()
        in_turns = yield
        self._compute(ComputePhase.SHARED_B)
        self.lanes.wait(uncombined)
        self._compute(ComputePhase.EXPERTS_B, layer)
        if in_turns:
            yield
        undispatched = self._launch(Exchange.DISPATCH_BACKWARD, layer)
        settle(layer)
        yield
        self.lanes.wait(undispatched)
        self._compute(ComputePhase.ATTENTION_B)
        left.append(ComputePhase.ATTENTION_W)

    def _compute(self, phase: ComputePhase, layer: int | None = None) -> None:
        shape = self.shape
        if layer is not None and self.rows:
            shape = replace(shape, received=self.rows[layer % len(self.rows)])
        self.lanes.compute(phase, self.cost.phase(shape, phase), self.cost.gaps(phase))

    def _launch(self, exchange: Exchange, layer: int) -> _Flight:
        travel = self.wire.travel(self.shape, exchange)
        return self.lanes.launch(travel, travel.syncs[layer % len(travel.syncs)] if self.waits else 0.0)


@dataclass(frozen=True)
class ChunkCosts:
    """How long the instructions of a program take, by what the stages hold."""

    shape: Shape
    cost: Compute
    wire: ExchangePricer
    _lanes: dict[tuple[str, StageShape | None, StageShape | None], Lanes] = field(default_factory=dict)

    def apart(self) -> ChunkCosts:
        """The same prices, counted in no coverage but their own."""
        coverage = Coverage(at_best=self.cost.coverage.at_best)
        cost = Compute(self.cost.cluster, self.cost.recipe, self.cost.table, coverage)
        return ChunkCosts(
            self.shape, cost, ExchangePricer(self.wire.cluster, self.wire.recipe, self.wire.table, coverage)
        )

    def run(self, op: str, forward: StageShape | None, backward: StageShape | None) -> Lanes:
        """The lanes after one instruction: `op` is F, B, I, W or FB."""
        key = op, forward, backward
        if key not in self._lanes:
            self._lanes[key] = self._run(*key)
        return self._lanes[key]

    def _run(self, op: str, forward: StageShape | None, backward: StageShape | None) -> Lanes:
        lanes = Lanes()
        sync = self.cost.recipe.sync
        in_turns = op == "FB" and self.cost.recipe.overlap
        waits = sync is Sync.EVERYWHERE or (sync is Sync.PAIRS and in_turns)
        ahead = None if forward is None else self._chunk(forward, lanes, waits).forward()
        if backward is None:
            assert ahead is not None
            drive(ahead)
        elif op == "W":
            self._chunk(backward, lanes, waits).weight_gradients()
        elif ahead is None:
            drive(self._chunk(backward, lanes, waits).backward(op == "B"))
        elif in_turns:
            take_turns(self._chunk(backward, lanes, waits).backward(True), ahead)
        else:  # as the executor does without `schedule.overlap`
            drive(ahead)
            drive(self._chunk(backward, lanes, waits).backward(True))
        return lanes

    def _chunk(self, stage: StageShape, lanes: Lanes, waits: bool) -> SimulatedChunk:
        return SimulatedChunk(stage, self.shape, self.cost, self.wire, lanes, waits)

    def compute_seconds(self, stage: StageShape) -> float:
        """Forward and whole backward of one micro-batch without any waiting: no order of things can be faster."""
        return sum(self.run(op, forward, backward).now for op, forward, backward in _alone(stage)) - sum(
            self.run(op, forward, backward).exposed for op, forward, backward in _alone(stage)
        )


def _alone(stage: StageShape) -> tuple[tuple[str, StageShape | None, StageShape | None], ...]:
    return ("F", stage, None), ("B", None, stage)
