"""Peak memory of one rank: its state, and the largest sum over its program's instructions of all that is live."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ...comm.exchange.config import ExchangeConfig
from ...comm.exchange.deepep_buffer import DeepEPBufferShape, deepep_buffer_bytes
from ...comm.exchange.wire_format import WireFormat
from ...parallelism.pipeline.liveness import LiveCounts, LiveInstruction
from ...parallelism.pipeline.program import Op
from .chunk import ChunkMemorySimulator, MemoryKind, PeakMeter, simulate_instruction

CUDA_CONTEXT_BYTES = 2.0e9
"""Assumed bytes of CUDA context, libraries and NCCL's communicators (about 12 per rank), without all-to-alls."""
NCCL_ALL_TO_ALL_BYTES = 1.0e9
"""Assumed bytes of NCCL's buffers for the all-to-alls of `flat` and `two_hop`: one per channel and peer."""
_LABELS = {"fp8_weights": "FP8 weights", "average": "EMA weights", "p2p_messages": "P2P messages"}


def memory_label(kind: str) -> str:
    """Return the label of a kind of memory in tables and pages: of `StateBytes`, `MemoryKind` or the planner's sums."""
    return _LABELS.get(kind, kind.replace("_", " "))


@dataclass(frozen=True)
class StateBytes:
    """Bytes of model and optimizer state that one rank holds from step to step."""

    weights: float
    fp8_weights: float
    """FP8 copies that a step makes for all its micro-batches: one for the forward and a transposed one."""
    gradients: float
    masters: float
    moments: float
    average: float

    @property
    def total(self) -> float:
        """Bytes of all state."""
        return self.weights + self.fp8_weights + self.gradients + self.masters + self.moments + self.average


@dataclass(frozen=True)
class NonAllocatorMemory:
    """GPU memory outside of torch's allocator, in bytes."""

    context: float = 0.0
    exchange: float = 0.0
    """Buffers of the token exchange."""

    @property
    def total(self) -> float:
        """Bytes of context and exchange buffers."""
        return self.context + self.exchange

    @staticmethod
    def for_exchange(
        exchange: ExchangeConfig, shape: DeepEPBufferShape, nodes: int, ranks_a_node: int
    ) -> "NonAllocatorMemory":
        """Estimate it for an expert-parallel group of `ranks_a_node` ranks on each of `nodes`; not yet measured."""
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
    """Predicted memory of one rank, in bytes."""

    state: StateBytes
    """State from step to step, with the FP8 copies of weights."""
    at_peak: dict[MemoryKind, float]
    """Memory within a step at its peak, by kind."""
    between_instructions: float
    """Largest memory held between two instructions: activations, delayed weight gradients and P2P messages."""

    non_allocator: NonAllocatorMemory = NonAllocatorMemory()

    @property
    def total(self) -> float:
        """Peak bytes, outside of the allocator included."""
        return self.allocator_bytes + self.non_allocator.total

    @property
    def allocator_bytes(self) -> float:
        """Peak bytes within torch's allocator."""
        return self.state.total + self.within_step

    @property
    def within_step(self) -> float:
        """Peak bytes that are allocated and freed within a step."""
        return sum(self.at_peak.values())


@dataclass
class RankChunksMemory:
    """Chunks of a rank; caches the simulated memory of each kind of instruction on them."""

    chunks: Sequence[ChunkMemorySimulator]
    _runs: dict[tuple[Op, int | None, int | None], PeakMeter] = field(default_factory=dict)

    def peak_by_kind(self, moments: Iterable[LiveInstruction]) -> dict[MemoryKind, float]:
        """Return the memory by kind at the peak over the instructions `moments`."""
        return self._at(max(moments, key=self._size))

    def held_bytes(self, held: LiveCounts) -> float:
        """Return the bytes of saved activations, delayed weight gradients and P2P messages."""
        return (
            sum(alive * chunk.saved_bytes for alive, chunk in zip(held.awaiting_backward, self.chunks, strict=True))
            + sum(
                waiting * chunk.deferred_bytes
                for waiting, chunk in zip(held.awaiting_weight_grad, self.chunks, strict=True)
                if waiting
            )
            + held.p2p_messages * self.chunks[0].workspace.hidden_state_bytes
        )

    def _size(self, moment: LiveInstruction) -> float:
        """Return the peak bytes during the instruction."""
        # Three terms: what other micro-batches hold; what this instruction's own backward starts with, which is not
        # among the first; and the most that the instruction adds to both.
        return self.held_bytes(moment.live_counts) + self._own(moment) + self._run(moment.op_and_chunks).peak_total

    def _own(self, moment: LiveInstruction) -> float:
        """Return the bytes that the instruction's backward starts with."""
        if moment.backward_chunk is None:
            return 0.0
        own = self.chunks[moment.backward_chunk]
        return own.deferred_bytes if moment.op is Op.W else own.saved_bytes

    def _at(self, moment: LiveInstruction) -> dict[MemoryKind, float]:
        """Return the peak bytes during the instruction, by kind."""
        held, levels = moment.live_counts, dict(self._run(moment.op_and_chunks).at_peak)
        for chunk, alive, waiting in zip(self.chunks, held.awaiting_backward, held.awaiting_weight_grad, strict=True):
            levels[MemoryKind.ACTIVATIONS] += alive * chunk.saved_bytes
            levels[MemoryKind.DELAYED_WGRAD] += waiting * chunk.deferred_bytes if waiting else 0.0
        levels[MemoryKind.P2P_MESSAGES] += held.p2p_messages * self.chunks[0].workspace.hidden_state_bytes
        levels[MemoryKind.DELAYED_WGRAD if moment.op is Op.W else MemoryKind.ACTIVATIONS] += self._own(moment)
        return levels

    def _run(self, work: tuple[Op, int | None, int | None]) -> PeakMeter:
        if work not in self._runs:
            op, forward, backward = work
            self._runs[work] = simulate_instruction(
                op, *(None if chunk is None else self.chunks[chunk] for chunk in (forward, backward))
            )
        return self._runs[work]


def predict_rank_memory(
    state: StateBytes,
    chunks: RankChunksMemory,
    instructions: Iterable[LiveInstruction],
    between_instructions: Iterable[LiveCounts],
    optimizer_bytes: float,
    non_allocator: NonAllocatorMemory,
) -> RankMemory:
    """Predict the memory of a rank; `optimizer_bytes` is the workspace of the optimizer at the end of a step."""
    # The optimizer runs when no chunk does and all activations are freed, so the peak is the larger of the two.
    worst = chunks.peak_by_kind(instructions)
    if optimizer_bytes > sum(worst.values()):
        worst = dict.fromkeys(MemoryKind, 0.0) | {MemoryKind.WORKSPACE: optimizer_bytes}
    return RankMemory(
        state, worst, max((chunks.held_bytes(held) for held in between_instructions), default=0.0), non_allocator
    )
