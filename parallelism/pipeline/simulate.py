"""Runs a program on paper: when each instruction starts and ends, how long each rank waits."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from .communication import P2POp, derive_p2p_batches
from .placement import Direction
from .program import Instruction, InvalidProgramError, Op, PipelineProgram, describe_instruction

InstructionDuration = Callable[[int, Instruction], float]
"""How long a rank takes for an instruction."""


@dataclass(frozen=True)
class OpDurations:
    """Durations that depend on the op alone, in any unit: those of one chunk."""

    forward: float = 1.0
    """F."""
    input_gradient: float = 1.0
    """I."""
    weight_gradient: float = 1.0
    """W."""
    backward: float | None = None
    """B; None for I + W."""
    forward_backward: float | None = None
    """FB; None for F + B, as if nothing overlapped."""

    @property
    def backward_duration(self) -> float:
        """B."""
        return self.input_gradient + self.weight_gradient if self.backward is None else self.backward

    @property
    def forward_backward_duration(self) -> float:
        """FB."""
        return self.forward + self.backward_duration if self.forward_backward is None else self.forward_backward

    def duration_of_op(self, op: Op) -> float:
        """How long `op` takes."""
        return {
            Op.F: self.forward,
            Op.B: self.backward_duration,
            Op.I: self.input_gradient,
            Op.W: self.weight_gradient,
            Op.FB: self.forward_backward_duration,
        }[op]

    def __call__(self, rank: int, instruction: Instruction) -> float:
        """The duration of `instruction`, on whatever rank."""
        return self.duration_of_op(instruction.op)


@dataclass(frozen=True)
class SimulatedTimes:
    """The times of every instruction of every rank, from the moment the first one starts."""

    program: PipelineProgram
    start_times: tuple[tuple[float, ...], ...]
    end_times: tuple[tuple[float, ...], ...]

    @property
    def makespan(self) -> float:
        """When the last instruction ends."""
        return max((rank[-1] for rank in self.end_times if rank), default=0.0)

    @property
    def busy_time_per_rank(self) -> tuple[float, ...]:
        """How long each rank computes."""
        return tuple(sum(ends) - sum(starts) for starts, ends in zip(self.start_times, self.end_times, strict=True))

    @property
    def bubble_time_per_rank(self) -> tuple[float, ...]:
        """How long each rank waits between the first start and the last end of the whole program."""
        return tuple(self.makespan - busy for busy in self.busy_time_per_rank)

    @property
    def bubble_fraction(self) -> float:
        """The share of all ranks' time that is bubble."""
        total = self.makespan * self.program.ranks
        return sum(self.bubble_time_per_rank) / total if total else 0.0


def simulate_program(
    program: PipelineProgram, duration: InstructionDuration, transfer_time: float = 0.0
) -> SimulatedTimes:
    """Run `program` under the rendezvous model (see `derive_p2p_batches`) and note the times.

    `transfer` is how long a batch of messages takes once both ends are there. Raises `InvalidProgramError` when the program
    deadlocks. It must be complete, which `check` proves.
    """
    run = _Run(program, duration, transfer_time)
    run.to_the_end()
    return SimulatedTimes(program, tuple(map(tuple, run.starts)), tuple(map(tuple, run.ends)))


def ideal_bubble_time(program: PipelineProgram, mean_durations: Mapping[Op, float]) -> float:
    """How long the ranks of `program` wait by themselves, together: each to the end of its last instruction.

    That is, where every instruction takes the mean of its kind, exchanges that it waits for included, and messages take
    no time. What ranks wait beyond that, stages or machines that differ are to blame for, or messages.
    """
    ideal = simulate_program(program, OpDurations(*(mean_durations[op] for op in (Op.F, Op.I, Op.W, Op.B, Op.FB))))
    return sum(ends[-1] - busy for ends, busy in zip(ideal.end_times, ideal.busy_time_per_rank, strict=True) if ends)


@dataclass
class _Lane:
    """One rank's queue of batches in one direction."""

    rank: int
    batches: list[tuple[int, list[P2POp], list[P2POp]]] = field(default_factory=list)
    """The commit's number, what is sent, what is received; batches without messages are left out."""
    front: int = 0
    is_open: bool = False
    unmet: int = 0
    """Messages of the open batch whose other end is not open yet."""
    time: float = 0.0
    """When the last batch was complete; of an open one so far."""


class _Run:
    """The state of a replay. Times only ever depend on earlier times, so the order of looking at lanes is free."""

    def __init__(self, program: PipelineProgram, duration: InstructionDuration, transfer: float) -> None:
        self.starts: list[list[float]] = [[] for _ in program.instructions]
        self.ends: list[list[float]] = [[] for _ in program.instructions]
        self._program, self._duration, self._transfer = program, duration, transfer
        self._commits = derive_p2p_batches(program)
        self._arrived: dict[P2POp, float] = {}
        self._waiting: dict[P2POp, tuple[_Lane, float]] = {}
        """Messages with one end open, and since when."""
        self._lanes: defaultdict[int, list[_Lane]] = defaultdict(list)
        for rank, commits in enumerate(self._commits):
            for direction in Direction:
                lane = _Lane(rank)
                for index, commit in enumerate(commits):
                    sends = [edge for edge in commit.sends if edge.direction is direction]
                    receives = [edge for edge in commit.receives if edge.direction is direction]
                    if sends or receives:
                        lane.batches.append((index, sends, receives))
                self._lanes[rank].append(lane)
        self._ready: deque[int] = deque(range(program.ranks))
        """Ranks of which something may have become possible."""

    def to_the_end(self) -> None:
        """Go on until nothing moves."""
        while self._ready:
            rank = self._ready.popleft()
            for lane in self._lanes[rank]:
                self._advance(lane)
            self._compute(rank)
        if stuck := list(self._stuck()):
            raise InvalidProgramError("deadlock: " + "; ".join(stuck))

    def _advance(self, lane: _Lane) -> None:
        """Open and close batches as far as can be."""
        while lane.front < len(lane.batches):
            commit, sends, receives = lane.batches[lane.front]
            ends = self.ends[lane.rank]
            if not lane.is_open:
                if commit > len(ends):
                    return
                lane.is_open = True
                lane.time = max(lane.time, ends[commit - 1] if commit else 0.0)
                self._meet(lane, [*sends, *receives])
            if lane.unmet:
                return
            self._arrived.update(dict.fromkeys(receives, lane.time))
            lane.is_open = False
            lane.front += 1

    def _meet(self, lane: _Lane, messages: list[P2POp]) -> None:
        opened = lane.time
        for edge in messages:
            if edge not in self._waiting:
                self._waiting[edge] = lane, opened
                lane.unmet += 1
                continue
            other, since = self._waiting.pop(edge)
            done = max(opened, since) + self._transfer
            lane.time = max(lane.time, done)
            other.time = max(other.time, done)
            other.unmet -= 1
            self._ready.append(other.rank)

    def _compute(self, rank: int) -> None:
        """Run the next instruction of `rank` if all it needs has arrived."""
        instructions, ends = self._program.instructions[rank], self.ends[rank]
        if len(ends) == len(instructions):
            return
        needs = self._commits[rank][len(ends)].required_receives
        if any(edge not in self._arrived for edge in needs):
            return
        start = max([ends[-1] if ends else 0.0, *(self._arrived[edge] for edge in needs)])
        self.starts[rank].append(start)
        ends.append(start + self._duration(rank, instructions[len(ends)]))
        self._ready.append(rank)

    def _stuck(self) -> Iterator[str]:
        for rank, instructions in enumerate(self._program.instructions):
            index = len(self.ends[rank])
            if index < len(instructions):
                missing = next(
                    edge for edge in self._commits[rank][index].required_receives if edge not in self._arrived
                )
                yield f"{describe_instruction(rank, index, instructions[index])} waits for the {missing}"
