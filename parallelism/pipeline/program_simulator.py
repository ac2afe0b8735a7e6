"""Simulator for one program and many durations: the dependencies are sorted once."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .communication import P2PBatch, P2POp, derive_p2p_batches
from .placement import Direction
from .program import InvalidProgramError, PipelineProgram
from .simulate import InstructionDuration, SimulatedTimes


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
    """Instructions and batches of one program in topological order.

    A batch opens when the previous batch in its direction is complete and the instruction before it has ended. It
    completes `transfer_time` after it and the batches at the other ends of its messages are open.
    """

    # So every time is a maximum of earlier ones, and one pass over the nodes times a program. `simulate_program`
    # derives the messages again in each call.

    program: PipelineProgram
    _nodes: tuple[_Node, ...]

    @staticmethod
    def from_program(program: PipelineProgram) -> ProgramSimulator:
        """Sort a complete program (`verify_program`). Raises `InvalidProgramError` for a deadlock."""
        return ProgramSimulator(program, tuple(_topologically_sorted(_Builder(program).nodes())))

    def simulate(self, duration: InstructionDuration, transfer_time: float = 0.0) -> SimulatedTimes:
        """Return the times that `simulate_program` returns for the same arguments."""
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


class _Builder:
    """Numbers the nodes: the instructions of all ranks, the openings of all batches, their completions."""

    def __init__(self, program: PipelineProgram) -> None:
        self._program = program
        self._first: list[int] = []
        count = 0
        for row in program.instructions:
            self._first.append(count)
            count += len(row)
        self._instructions = count

    def nodes(self) -> list[_Node]:
        p2p_batches = derive_p2p_batches(self._program)
        opened: dict[P2POp, list[int]] = {}
        arrives: dict[P2POp, int] = {}
        batches: list[tuple[int | None, int | None, list[P2POp]]] = []
        for rank, row in enumerate(p2p_batches):
            for direction in Direction:
                previous: int | None = None
                for index, messages in _batches(row, direction):
                    number = len(batches)
                    before = self._first[rank] + index - 1 if index else None
                    batches.append((before, previous, messages))
                    previous = number
                    for p2p_op in messages:
                        opened.setdefault(p2p_op, []).append(number)
                    arrives.update((p2p_op, number) for p2p_op in row[index].receives if p2p_op.direction is direction)
        opening = self._instructions
        complete = opening + len(batches)
        nodes = list(self._of_instructions(p2p_batches, arrives, complete))
        for instruction, previous, _ in batches:
            ends = [instruction] if instruction is not None else []
            nodes.append(_Node((*ends, *([complete + previous] if previous is not None else []))))
        for _, _, messages in batches:
            nodes.append(_Node(tuple({opening + end for p2p_op in messages for end in opened[p2p_op]}), travels=True))
        return nodes

    def _of_instructions(
        self, p2p_batches: Sequence[Sequence[P2PBatch]], arrives: dict[P2POp, int], complete: int
    ) -> Iterator[_Node]:
        for rank, row in enumerate(self._program.instructions):
            for index in range(len(row)):
                own = [self._first[rank] + index - 1] if index else []
                needs = [complete + arrives[p2p_op] for p2p_op in p2p_batches[rank][index].required_receives]
                yield _Node((*own, *needs), rank, index)


def _batches(p2p_batches: Sequence[P2PBatch], direction: Direction) -> Iterator[tuple[int, list[P2POp]]]:
    """Yield one rank's batches in one direction that contain messages, with their numbers."""
    for index, p2p_batch in enumerate(p2p_batches):
        messages = [p2p_op for p2p_op in (*p2p_batch.sends, *p2p_batch.receives) if p2p_op.direction is direction]
        if messages:
            yield index, messages


def _topologically_sorted(nodes: Sequence[_Node]) -> Iterator[_Node]:
    """Yield each node after those that it waits for, whose indices are replaced by those of the new order."""
    waiting = [len(node.after) for node in nodes]
    followers: list[list[int]] = [[] for _ in nodes]
    for number, node in enumerate(nodes):
        for other in node.after:
            followers[other].append(number)
    ready = deque(number for number, count in enumerate(waiting) if count == 0)
    place: dict[int, int] = {}
    while ready:
        number = ready.popleft()
        node = nodes[number]
        place[number] = len(place)
        yield _Node(tuple(place[other] for other in node.after), node.rank, node.place, node.travels)
        for follower in followers[number]:
            waiting[follower] -= 1
            if waiting[follower] == 0:
                ready.append(follower)
    if len(place) < len(nodes):
        raise InvalidProgramError("deadlock: some instructions wait for each other; `verify_program` names them")
