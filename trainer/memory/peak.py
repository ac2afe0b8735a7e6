"""Bytes of one rank at its worst moment: its state, and its program replayed with what every chunk holds and needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ...comm.exchange.config import ExchangeConfig
from ...comm.exchange.deepep_buffer import DeepEPBufferShape, deepep_buffer_bytes
from ...comm.exchange.wire_format import WireFormat
from ...parallelism.pipeline.liveness import LiveCounts, LiveInstruction
from ...parallelism.pipeline.program import Op
from .chunk import ChunkMemorySimulator, MemoryKind, PeakMeter
from .state import StateBytes

CUDA_CONTEXT_BYTES = 2.0e9
"""Assumed: CUDA context, libraries, and NCCL's communicators (about 12 a rank) without their all-to-alls."""
NCCL_ALL_TO_ALL_BYTES = 1.0e9
"""Assumed: what NCCL buffers for the all-to-alls of `flat` and `two_hop`, for each channel to each peer."""


@dataclass(frozen=True)
class NonAllocatorMemory:
    """Bytes of a GPU that no allocator of torch sees."""

    context: float = 0.0
    exchange: float = 0.0
    """Buffers of the token exchange."""

    @property
    def total(self) -> float:
        """Both."""
        return self.context + self.exchange

    @staticmethod
    def for_exchange(
        exchange: ExchangeConfig, shape: DeepEPBufferShape, nodes: int, ranks_a_node: int
    ) -> NonAllocatorMemory:
        """Of a rank whose expert-parallel group has `ranks_a_node` on each of `nodes`. Not yet measured on hardware."""
        if nodes * ranks_a_node == 1:
            return NonAllocatorMemory(CUDA_CONTEXT_BYTES)
        if exchange.name == "deepep":
            fp8 = exchange.dispatch == WireFormat.FP8
            return NonAllocatorMemory(
                CUDA_CONTEXT_BYTES, deepep_buffer_bytes(shape, nodes, ranks_a_node, fp8_dispatch=fp8)
            )
        return NonAllocatorMemory(CUDA_CONTEXT_BYTES, NCCL_ALL_TO_ALL_BYTES)


@dataclass(frozen=True)
class RankMemory:
    """What one rank needs."""

    state: StateBytes
    """From step to step, and FP8 copies of weights during one."""
    at_peak: dict[MemoryKind, float]
    """What comes and goes, at the worst moment of a step."""
    between_instructions: float
    """The most of it that is held when an instruction is about to begin: activations, deferred work and messages."""

    non_allocator: NonAllocatorMemory = NonAllocatorMemory()

    @property
    def total(self) -> float:
        """At the worst moment."""
        return self.allocator_bytes + self.non_allocator_bytes

    @property
    def non_allocator_bytes(self) -> float:
        """On a GPU, outside of the allocator."""
        return self.non_allocator.total

    @property
    def allocator_bytes(self) -> float:
        """What an allocator sees of it."""
        return self.state.total + sum(self.at_peak.values())


@dataclass
class RankChunksMemory:
    """The chunks of a rank; remembers how each instruction runs on them."""

    chunks: Sequence[ChunkMemorySimulator]
    _runs: dict[tuple[Op, int | None, int | None], PeakMeter] = field(default_factory=dict)

    def peak_by_kind(self, moments: Iterable[LiveInstruction]) -> dict[MemoryKind, float]:
        """Levels at the worst of the `moments`."""
        return self._at(max(moments, key=self._size))

    def held_bytes(self, held: LiveCounts) -> float:
        """Bytes of what is in flight, put off or on its way."""
        return (
            sum(alive * chunk.saved_bytes for alive, chunk in zip(held.awaiting_backward, self.chunks, strict=True))
            + sum(
                waiting * chunk.deferred_bytes
                for waiting, chunk in zip(held.awaiting_weight_grad, self.chunks, strict=True)
                if waiting
            )
            + held.p2p_messages * self.chunks[0].message_bytes
        )

    def _size(self, moment: LiveInstruction) -> float:
        """Of all that is here: what others hold, what the instruction begins with, and the most that it needs then."""
        return self.held_bytes(moment.live_counts) + self._own(moment) + self._run(moment.op_and_chunks).peak_total

    def _own(self, moment: LiveInstruction) -> float:
        """What a backward begins with."""
        if moment.backward_chunk is None:
            return 0.0
        own = self.chunks[moment.backward_chunk]
        return own.deferred_bytes if moment.op is Op.W else own.saved_bytes

    def _at(self, moment: LiveInstruction) -> dict[MemoryKind, float]:
        """The same by kind."""
        held, levels = moment.live_counts, dict(self._run(moment.op_and_chunks).at_peak)
        for chunk, alive, waiting in zip(self.chunks, held.awaiting_backward, held.awaiting_weight_grad, strict=True):
            levels[MemoryKind.ACTIVATIONS] += alive * chunk.saved_bytes
            levels[MemoryKind.DEFERRED] += waiting * chunk.deferred_bytes if waiting else 0.0
        levels[MemoryKind.MESSAGES] += held.p2p_messages * self.chunks[0].message_bytes
        levels[MemoryKind.DEFERRED if moment.op is Op.W else MemoryKind.ACTIVATIONS] += self._own(moment)
        return levels

    def _run(self, work: tuple[Op, int | None, int | None]) -> PeakMeter:
        if work not in self._runs:
            op, forward, backward = work
            ahead = None if forward is None else self.chunks[forward]
            behind = None if backward is None else self.chunks[backward]
            if behind is None:
                assert ahead is not None
                self._runs[work] = ahead.simulate(op)
            else:
                self._runs[work] = behind.simulate(op, ahead)
        return self._runs[work]


def predict_rank_memory(
    state: StateBytes,
    chunks: RankChunksMemory,
    instructions: Iterable[LiveInstruction],
    between_instructions: Iterable[LiveCounts],
    optimizer_bytes: float,
    non_allocator: NonAllocatorMemory,
) -> RankMemory:
    """`update`: bytes that the end of a step needs, when no chunk runs."""
    worst = chunks.peak_by_kind(instructions)
    if optimizer_bytes > sum(worst.values()):
        worst = dict.fromkeys(MemoryKind, 0.0) | {MemoryKind.WORKING: optimizer_bytes}
    return RankMemory(
        state, worst, max((chunks.held_bytes(held) for held in between_instructions), default=0.0), non_allocator
    )
