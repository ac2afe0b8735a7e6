"""Times of a program that is simulated again and again: what depends on what is worked out once."""

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
    """An instruction, or a batch of messages: when it can begin, and what it is."""

    after: tuple[int, ...]
    """Ends of other nodes that it waits for."""
    rank: int = -1
    place: int = -1
    """Of the instruction in its rank's list; both -1 for a batch."""
    travels: bool = False
    """Whether a batch holds messages of which this is the end, and not only a moment at which it opens."""


@dataclass(frozen=True)
class ProgramSimulator:
    """The events of one program in an order in which each comes after all that it waits for.

    A batch of messages opens when the batch before it in its lane is complete and the instruction before its commit has
    ended; it is complete `transfer` after it and the batches at the other ends of its messages are open. So every time
    is a maximum of earlier ones, and a program is timed in one pass.
    """

    program: PipelineProgram
    _nodes: tuple[_Node, ...]

    @staticmethod
    def from_program(program: PipelineProgram) -> ProgramSimulator:
        """Raises `InvalidProgramError` when the program deadlocks; it must be complete, which `check` proves."""
        return ProgramSimulator(program, tuple(_sorted(_Builder(program).nodes())))

    def simulate(self, duration: InstructionDuration, transfer_time: float = 0.0) -> SimulatedTimes:
        """What `simulate_program` returns for the same arguments."""
        instructions = self.program.instructions
        starts: list[list[float]] = [[0.0] * len(row) for row in instructions]
        ends: list[list[float]] = [[0.0] * len(row) for row in instructions]
        times: list[float] = []
        end_of, note = times.__getitem__, times.append
        for after, rank, index, travels in self._nodes:
            time = max(map(end_of, after)) if after else 0.0
            if rank >= 0:
                starts[rank][index] = time
                time += duration(rank, instructions[rank][index])
                ends[rank][index] = time
            elif travels:
                time += transfer_time
            note(time)
        return SimulatedTimes(self.program, tuple(map(tuple, starts)), tuple(map(tuple, ends)))


class _Builder:
    """Numbers the events: of each rank its instructions, of each batch its opening and its completion."""

    def __init__(self, program: PipelineProgram) -> None:
        self._program = program
        self._first: list[int] = []
        count = 0
        for row in program.instructions:
            self._first.append(count)
            count += len(row)
        self._instructions = count

    def nodes(self) -> list[_Node]:
        commits = derive_p2p_batches(self._program)
        opened: dict[P2POp, list[int]] = {}
        arrives: dict[P2POp, int] = {}
        batches: list[tuple[int | None, int | None, list[P2POp]]] = []
        for rank, row in enumerate(commits):
            for direction in Direction:
                previous: int | None = None
                for index, messages in _batches(row, direction):
                    number = len(batches)
                    before = self._first[rank] + index - 1 if index else None
                    batches.append((before, previous, messages))
                    previous = number
                    for edge in messages:
                        opened.setdefault(edge, []).append(number)
                    arrives.update((edge, number) for edge in row[index].receives if edge.direction is direction)
        opening = self._instructions
        complete = opening + len(batches)
        nodes = list(self._of_instructions(commits, arrives, complete))
        for instruction, previous, _ in batches:
            ends = [instruction] if instruction is not None else []
            nodes.append(_Node((*ends, *([complete + previous] if previous is not None else []))))
        for _, _, messages in batches:
            nodes.append(_Node(tuple({opening + end for edge in messages for end in opened[edge]}), travels=True))
        return nodes

    def _of_instructions(
        self, commits: Sequence[Sequence[P2PBatch]], arrives: dict[P2POp, int], complete: int
    ) -> Iterator[_Node]:
        for rank, row in enumerate(self._program.instructions):
            for index in range(len(row)):
                own = [self._first[rank] + index - 1] if index else []
                needs = [complete + arrives[edge] for edge in commits[rank][index].required_receives]
                yield _Node((*own, *needs), rank, index)


def _batches(commits: Sequence[P2PBatch], direction: Direction) -> Iterator[tuple[int, list[P2POp]]]:
    """One rank's batches in one direction; those without messages are left out."""
    for index, commit in enumerate(commits):
        messages = [edge for edge in (*commit.sends, *commit.receives) if edge.direction is direction]
        if messages:
            yield index, messages


def _sorted(nodes: Sequence[_Node]) -> Iterator[_Node]:
    """Each node after those that it waits for, which it names by their place in the new order."""
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
        raise InvalidProgramError("deadlock: some instructions wait for each other; `check` says which")
