"""Bytes of one rank at its worst moment: its state, and its program replayed with what every chunk holds and needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ...comm.exchange.config import ExchangeConfig
from ...comm.exchange.deepep_buffer import BufferShape, buffer_bytes
from ...comm.exchange.wire import Format
from ...parallelism.pipeline.liveness import LiveCounts, LiveInstruction
from ...parallelism.pipeline.program import Op
from .chunk import ChunkMemory, MemoryKind, PeakMeter
from .state import StateBytes

CONTEXT = 2.0e9
"""Assumed: CUDA context, libraries, and NCCL's communicators (about 12 a rank) without their all-to-alls."""
ALL_TO_ALL = 1.0e9
"""Assumed: what NCCL buffers for the all-to-alls of `flat` and `two_hop`, for each channel to each peer."""


@dataclass(frozen=True)
class Outside:
    """Bytes of a GPU that no allocator of torch sees."""

    context: float = 0.0
    exchange: float = 0.0
    """Buffers of the token exchange."""

    @property
    def total(self) -> float:
        """Both."""
        return self.context + self.exchange

    @staticmethod
    def of(exchange: ExchangeConfig, shape: BufferShape, nodes: int, ranks_a_node: int) -> Outside:
        """Of a rank whose expert-parallel group has `ranks_a_node` on each of `nodes`. Not yet measured on hardware."""
        if nodes * ranks_a_node == 1:
            return Outside(CONTEXT)
        if exchange.name == "deepep":
            fp8 = exchange.dispatch == Format.FP8
            return Outside(CONTEXT, buffer_bytes(shape, nodes, ranks_a_node, fp8_dispatch=fp8))
        return Outside(CONTEXT, ALL_TO_ALL)


@dataclass(frozen=True)
class RankMemory:
    """What one rank needs."""

    state: StateBytes
    """From step to step, and FP8 copies of weights during one."""
    at_worst: dict[MemoryKind, float]
    """What comes and goes, at the worst moment of a step."""
    between: float
    """The most of it that is held when an instruction is about to begin: activations, deferred work and messages."""

    outside: Outside = Outside()

    @property
    def total(self) -> float:
        """At the worst moment."""
        return self.allocated + self.fixed

    @property
    def fixed(self) -> float:
        """On a GPU, outside of the allocator."""
        return self.outside.total

    @property
    def allocated(self) -> float:
        """What an allocator sees of it."""
        return self.state.total + sum(self.at_worst.values())


@dataclass
class Chunks:
    """The chunks of a rank; remembers how each instruction runs on them."""

    chunks: Sequence[ChunkMemory]
    _runs: dict[tuple[Op, int | None, int | None], PeakMeter] = field(default_factory=dict)

    def worst(self, moments: Iterable[LiveInstruction]) -> dict[MemoryKind, float]:
        """Levels at the worst of the `moments`."""
        return self._at(max(moments, key=self._size))

    def held(self, held: LiveCounts) -> float:
        """Bytes of what is in flight, put off or on its way."""
        return (
            sum(alive * chunk.kept for alive, chunk in zip(held.alive, self.chunks, strict=True))
            + sum(waiting * chunk.waiting for waiting, chunk in zip(held.waiting, self.chunks, strict=True) if waiting)
            + held.messages * self.chunks[0].message
        )

    def _size(self, moment: LiveInstruction) -> float:
        """Of all that is here: what others hold, what the instruction begins with, and the most that it needs then."""
        return self.held(moment.held) + self._own(moment) + self._run(moment.work).largest

    def _own(self, moment: LiveInstruction) -> float:
        """What a backward begins with."""
        if moment.backward is None:
            return 0.0
        own = self.chunks[moment.backward]
        return own.waiting if moment.op is Op.W else own.kept

    def _at(self, moment: LiveInstruction) -> dict[MemoryKind, float]:
        """The same by kind."""
        held, levels = moment.held, dict(self._run(moment.work).peak)
        for chunk, alive, waiting in zip(self.chunks, held.alive, held.waiting, strict=True):
            levels[MemoryKind.ACTIVATIONS] += alive * chunk.kept
            levels[MemoryKind.DEFERRED] += waiting * chunk.waiting if waiting else 0.0
        levels[MemoryKind.MESSAGES] += held.messages * self.chunks[0].message
        levels[MemoryKind.DEFERRED if moment.op is Op.W else MemoryKind.ACTIVATIONS] += self._own(moment)
        return levels

    def _run(self, work: tuple[Op, int | None, int | None]) -> PeakMeter:
        if work not in self._runs:
            op, forward, backward = work
            ahead = None if forward is None else self.chunks[forward]
            behind = None if backward is None else self.chunks[backward]
            if behind is None:
                assert ahead is not None
                self._runs[work] = ahead.run(op)
            else:
                self._runs[work] = behind.run(op, ahead)
        return self._runs[work]


def rank_memory(
    state: StateBytes,
    chunks: Chunks,
    moments: Iterable[LiveInstruction],
    between: Iterable[LiveCounts],
    update: float,
    outside: Outside,
) -> RankMemory:
    """`update`: bytes that the end of a step needs, when no chunk runs."""
    worst = chunks.worst(moments)
    if update > sum(worst.values()):
        worst = dict.fromkeys(MemoryKind, 0.0) | {MemoryKind.WORKING: update}
    return RankMemory(state, worst, max((chunks.held(held) for held in between), default=0.0), outside)
