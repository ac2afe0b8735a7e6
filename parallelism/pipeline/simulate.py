"""Simulation of a program: start and end of each instruction, bubble of each rank."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from .communication import P2POp, derive_p2p_batches
from .placement import Direction
from .program import Instruction, InvalidProgramError, Op, PipelineProgram, describe_instruction

InstructionDuration = Callable[[int, Instruction], float]
"""Function from (rank, instruction) to its duration."""


@dataclass(frozen=True)
class OpDurations:
    """Durations of one chunk by op, in any unit."""

    forward: float = 1.0
    """Duration of F."""
    input_gradient: float = 1.0
    """Duration of I."""
    weight_gradient: float = 1.0
    """Duration of W."""
    backward: float | None = None
    """Duration of B; None is I + W."""
    forward_backward: float | None = None
    """Duration of FB; None is F + B, no overlap."""

    @property
    def backward_duration(self) -> float:
        """Duration of B."""
        return self.input_gradient + self.weight_gradient if self.backward is None else self.backward

    @property
    def forward_backward_duration(self) -> float:
        """Duration of FB."""
        return self.forward + self.backward_duration if self.forward_backward is None else self.forward_backward

    def duration_of_op(self, op: Op) -> float:
        """Return the duration of `op`."""
        return {
            Op.F: self.forward,
            Op.B: self.backward_duration,
            Op.I: self.input_gradient,
            Op.W: self.weight_gradient,
            Op.FB: self.forward_backward_duration,
        }[op]

    def __call__(self, rank: int, instruction: Instruction) -> float:
        """Return the duration of `instruction`, equal on all ranks."""
        return self.duration_of_op(instruction.op)


@dataclass(frozen=True)
class SimulatedTimes:
    """Start and end times of every instruction of every rank; the first one starts at 0."""

    program: PipelineProgram
    start_times: tuple[tuple[float, ...], ...]
    end_times: tuple[tuple[float, ...], ...]

    @property
    def makespan(self) -> float:
        """End of the last instruction."""
        return max((rank[-1] for rank in self.end_times if rank), default=0.0)

    @property
    def busy_time_per_rank(self) -> tuple[float, ...]:
        """Time that each rank computes."""
        return tuple(sum(ends) - sum(starts) for starts, ends in zip(self.start_times, self.end_times, strict=True))

    @property
    def bubble_time_per_rank(self) -> tuple[float, ...]:
        """Time that each rank waits between the first start and the last end of the whole program."""
        return tuple(self.makespan - busy for busy in self.busy_time_per_rank)

    @property
    def bubble_fraction(self) -> float:
        """Bubble as a share of all ranks' time."""
        total = self.makespan * self.program.ranks
        return sum(self.bubble_time_per_rank) / total if total else 0.0


def simulate_program(
    program: PipelineProgram, duration: InstructionDuration, transfer_time: float = 0.0
) -> SimulatedTimes:
    """Simulate a complete program (`verify_program`) under the rendezvous model of `derive_p2p_batches`.

    A batch of messages takes `transfer_time` once both ends are open. Raises `InvalidProgramError` for a deadlock.
    """
    run = _Run(program, duration, transfer_time)
    run.to_the_end()
    return SimulatedTimes(program, tuple(map(tuple, run.starts)), tuple(map(tuple, run.ends)))


def ideal_bubble_time(program: PipelineProgram, mean_durations: Mapping[Op, float]) -> float:
    """Return the total bubble of all ranks, each up to its last instruction, if the program is the only cause.

    Every instruction takes the mean of its op, waits for exchanges included, and messages take no time.
    """
    # Bubble beyond this comes from uneven stages, slow machines or messages.
    ideal = simulate_program(program, OpDurations(*(mean_durations[op] for op in (Op.F, Op.I, Op.W, Op.B, Op.FB))))
    return sum(ends[-1] - busy for ends, busy in zip(ideal.end_times, ideal.busy_time_per_rank, strict=True) if ends)


@dataclass
class _Channel:
    """Queue of one rank's batches in one direction."""

    rank: int
    batches: list[tuple[int, list[P2POp], list[P2POp]]] = field(default_factory=list)
    """(batch number, sends, receives); batches without messages are left out."""
    front: int = 0
    is_open: bool = False
    unmet: int = 0
    """Number of messages of the open batch whose other end is not open yet."""
    time: float = 0.0
    """Completion of the last batch; for an open one, the latest time so far."""


class _Run:
    """State of a simulation."""

    def __init__(self, program: PipelineProgram, duration: InstructionDuration, transfer: float) -> None:
        # No global clock: every time is a maximum of earlier times, so ranks may advance in any order.
        self.starts: list[list[float]] = [[] for _ in program.instructions]
        self.ends: list[list[float]] = [[] for _ in program.instructions]
        self._program, self._duration, self._transfer = program, duration, transfer
        self._p2p_batches = derive_p2p_batches(program)
        self._arrived: dict[P2POp, float] = {}
        self._waiting: dict[P2POp, tuple[_Channel, float]] = {}
        """Messages with one end open, with its channel and opening time."""
        self._channels: defaultdict[int, list[_Channel]] = defaultdict(list)
        for rank, p2p_batches in enumerate(self._p2p_batches):
            for direction in Direction:
                channel = _Channel(rank)
                for index, p2p_batch in enumerate(p2p_batches):
                    sends = [p2p_op for p2p_op in p2p_batch.sends if p2p_op.direction is direction]
                    receives = [p2p_op for p2p_op in p2p_batch.receives if p2p_op.direction is direction]
                    if sends or receives:
                        channel.batches.append((index, sends, receives))
                self._channels[rank].append(channel)
        self._ready: deque[int] = deque(range(program.ranks))
        """Ranks that may be able to advance."""

    def to_the_end(self) -> None:
        """Advance until no rank can. Raise `InvalidProgramError` if instructions are left."""
        while self._ready:
            rank = self._ready.popleft()
            for channel in self._channels[rank]:
                self._advance(channel)
            self._compute(rank)
        if stuck := list(self._stuck()):
            raise InvalidProgramError("deadlock: " + "; ".join(stuck))

    def _advance(self, channel: _Channel) -> None:
        """Open and complete batches of a channel until one has to wait."""
        while channel.front < len(channel.batches):
            number, sends, receives = channel.batches[channel.front]
            ends = self.ends[channel.rank]
            if not channel.is_open:
                if number > len(ends):
                    return
                channel.is_open = True
                channel.time = max(channel.time, ends[number - 1] if number else 0.0)
                self._match(channel, [*sends, *receives])
            if channel.unmet:
                return
            self._arrived.update(dict.fromkeys(receives, channel.time))
            channel.is_open = False
            channel.front += 1

    def _match(self, channel: _Channel, messages: list[P2POp]) -> None:
        opened = channel.time
        for p2p_op in messages:
            if p2p_op not in self._waiting:
                self._waiting[p2p_op] = channel, opened
                channel.unmet += 1
                continue
            other, since = self._waiting.pop(p2p_op)
            done = max(opened, since) + self._transfer
            channel.time = max(channel.time, done)
            other.time = max(other.time, done)
            other.unmet -= 1
            self._ready.append(other.rank)

    def _compute(self, rank: int) -> None:
        """Run the next instruction of `rank` if its inputs have arrived."""
        instructions, ends = self._program.instructions[rank], self.ends[rank]
        if len(ends) == len(instructions):
            return
        needs = self._p2p_batches[rank][len(ends)].required_receives
        if any(p2p_op not in self._arrived for p2p_op in needs):
            return
        start = max([ends[-1] if ends else 0.0, *(self._arrived[p2p_op] for p2p_op in needs)])
        self.starts[rank].append(start)
        ends.append(start + self._duration(rank, instructions[len(ends)]))
        self._ready.append(rank)

    def _stuck(self) -> Iterator[str]:
        for rank, instructions in enumerate(self._program.instructions):
            index = len(self.ends[rank])
            if index < len(instructions):
                missing = next(
                    p2p_op for p2p_op in self._p2p_batches[rank][index].required_receives if p2p_op not in self._arrived
                )
                yield f"{describe_instruction(rank, index, instructions[index])} waits for the {missing}"
