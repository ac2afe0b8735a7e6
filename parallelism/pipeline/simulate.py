"""Simulation of a program: start and end of each instruction, bubble of each rank."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from .communication import P2PBatch, P2POp, derive_p2p_batches
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
    def timed_instructions(self) -> list[list[tuple[Instruction, float, float]]]:
        """Each rank's instructions with their start and end."""
        rows = zip(self.program.instructions, self.start_times, self.end_times, strict=True)
        return [list(zip(*row, strict=True)) for row in rows]

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


class _Node(NamedTuple):
    """An instruction, or the opening or the completion of a batch of messages."""

    after: tuple[int, ...]
    """Nodes whose end it waits for."""
    rank: int = -1
    place: int = -1
    """Index of the instruction in its rank's list; `rank` and `place` are -1 for a batch."""
    travels: bool = False
    """True for the completion of a batch, which takes the transfer time."""


@dataclass(frozen=True)
class ProgramSimulator:
    """Instructions and batches of one program in topological order, for any number of durations.

    The rendezvous model of `derive_p2p_batches`: a batch opens when the previous batch in its direction is complete and
    the instruction before it has ended. It completes `transfer_time` after it and the batches at the other ends of its
    messages are open.
    """

    # No global clock: every time is a maximum of earlier ones, so one pass over the sorted nodes times a program.

    program: PipelineProgram
    """A complete program (`verify_program`)."""

    @cached_property
    def _nodes(self) -> tuple[_Node, ...]:
        return _Dependencies(self.program).sorted_nodes()

    def simulate(self, duration: InstructionDuration, transfer_time: float = 0.0) -> SimulatedTimes:
        """Return the times of all instructions; a batch takes `transfer_time` once both ends are open.

        Raises `InvalidProgramError` for a deadlock.
        """
        instructions = self.program.instructions
        starts: list[list[float]] = [[0.0] * len(row) for row in instructions]
        ends: list[list[float]] = [[0.0] * len(row) for row in instructions]
        times: list[float] = []
        # Bound methods: the loop below runs once per node and is what a simulation costs.
        time_of, append_time = times.__getitem__, times.append
        for after, rank, index, travels in self._nodes:
            time = max(map(time_of, after)) if after else 0.0
            if rank >= 0:
                starts[rank][index] = time
                time += duration(rank, instructions[rank][index])
                ends[rank][index] = time
            elif travels:
                time += transfer_time
            append_time(time)
        return SimulatedTimes(self.program, tuple(map(tuple, starts)), tuple(map(tuple, ends)))


def simulate_program(
    program: PipelineProgram, duration: InstructionDuration, transfer_time: float = 0.0
) -> SimulatedTimes:
    """Simulate a complete program once. Raises `InvalidProgramError` for a deadlock."""
    return ProgramSimulator(program).simulate(duration, transfer_time)


def ideal_bubble_time(program: PipelineProgram, mean_durations: Mapping[Op, float]) -> float:
    """Return the total bubble of all ranks, each up to its last instruction, if the program is the only cause.

    Every instruction takes the mean of its op, waits for exchanges included, and messages take no time.
    """
    # Bubble beyond this comes from uneven stages, slow machines or messages.
    ideal = simulate_program(program, OpDurations(*(mean_durations[op] for op in (Op.F, Op.I, Op.W, Op.B, Op.FB))))
    return sum(ends[-1] - busy for ends, busy in zip(ideal.end_times, ideal.busy_time_per_rank, strict=True) if ends)


class _Dependencies:
    """Dependencies of each node. Nodes are numbered: all instructions, openings of all batches, their completions."""

    def __init__(self, program: PipelineProgram) -> None:
        self._program = program
        self._p2p_batches = derive_p2p_batches(program)
        self._first_of_rank: list[int] = []
        """Number of each rank's first instruction."""
        self._opening = 0
        """Number of the first opening, which is the number of instructions."""
        for row in program.instructions:
            self._first_of_rank.append(self._opening)
            self._opening += len(row)
        self._completion: dict[P2POp, int] = {}
        """Number of the completion at which a message has arrived."""
        self._nodes = self._all_nodes()

    def sorted_nodes(self) -> tuple[_Node, ...]:
        """Return each node after those that it waits for, whose numbers become those of the new order."""
        waiting = [len(node.after) for node in self._nodes]
        followers: list[list[int]] = [[] for _ in self._nodes]
        for number, node in enumerate(self._nodes):
            for other in node.after:
                followers[other].append(number)
        ready = deque(number for number, count in enumerate(waiting) if count == 0)
        place: dict[int, int] = {}
        while ready:
            number = ready.popleft()
            place[number] = len(place)
            for follower in followers[number]:
                waiting[follower] -= 1
                if waiting[follower] == 0:
                    ready.append(follower)
        if len(place) < len(self._nodes):
            raise InvalidProgramError("deadlock: " + "; ".join(self._stuck(place)))
        return tuple(
            self._nodes[number]._replace(after=tuple(place[other] for other in self._nodes[number].after))
            for number in place
        )

    def _all_nodes(self) -> list[_Node]:
        opened: dict[P2POp, list[int]] = {}
        batches: list[tuple[tuple[int, ...], list[P2POp]]] = []
        complete = self._opening + sum(
            1 for row in self._p2p_batches for direction in Direction for _ in _batches(row, direction)
        )
        for rank, row in enumerate(self._p2p_batches):
            for direction in Direction:
                previous: tuple[int, ...] = ()
                for index, messages in _batches(row, direction):
                    number = len(batches)
                    before = (self._first_of_rank[rank] + index - 1,) if index else ()
                    batches.append(((*before, *previous), messages))
                    previous = (complete + number,)
                    for p2p_op in messages:
                        opened.setdefault(p2p_op, []).append(self._opening + number)
                    self._completion.update(
                        (p2p_op, complete + number) for p2p_op in row[index].receives if p2p_op.direction is direction
                    )
        return [
            *self._instructions(),
            *(_Node(after) for after, _ in batches),
            *(
                _Node(tuple({end for p2p_op in messages for end in opened[p2p_op]}), travels=True)
                for _, messages in batches
            ),
        ]

    def _instructions(self) -> Iterator[_Node]:
        for rank, row in enumerate(self._program.instructions):
            for index in range(len(row)):
                own = [self._first_of_rank[rank] + index - 1] if index else []
                needs = [self._completion[p2p_op] for p2p_op in self._p2p_batches[rank][index].required_receives]
                yield _Node((*own, *needs), rank, index)

    def _stuck(self, placed: Mapping[int, int]) -> Iterator[str]:
        """Describe the first instruction of each rank that never runs, with a message that it waits for."""
        for rank, row in enumerate(self._program.instructions):
            first = self._first_of_rank[rank]
            index = next((index for index in range(len(row)) if first + index not in placed), None)
            if index is not None:
                missing = next(
                    p2p_op
                    for p2p_op in self._p2p_batches[rank][index].required_receives
                    if self._completion[p2p_op] not in placed
                )
                yield f"{describe_instruction(rank, index, row[index])} waits for the {missing}"


def _batches(p2p_batches: Sequence[P2PBatch], direction: Direction) -> Iterator[tuple[int, list[P2POp]]]:
    """Yield one rank's batches in one direction that contain messages, with their numbers."""
    for index, p2p_batch in enumerate(p2p_batches):
        messages = [p2p_op for p2p_op in (*p2p_batch.sends, *p2p_batch.receives) if p2p_op.direction is direction]
        if messages:
            yield index, messages
