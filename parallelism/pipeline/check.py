"""Proves that a program computes a global batch and cannot deadlock."""

from __future__ import annotations

from collections import Counter, deque

from .placement import StagePlace
from .program import Instruction, MicroBatchWork, Op, Program, ProgramError, in_flight, where
from .simulate import UnitTimes, simulate_program


def check(program: Program) -> tuple[int, ...]:
    """Raise `ProgramError` unless `program` is right; return the peak number of chunks in flight on each rank.

    Proved: on every rank each micro-batch has one F and one B, or one I and one W, in each chunk, alone or as half of
    an FB; every W comes after its I, in the order of the I's; what a rank hands to itself it makes before it needs it;
    under the rendezvous model (see `edges`) every instruction gets to run. In flight is as `in_flight` counts it.
    """
    if len(program.instructions) != program.ranks:
        raise ProgramError(f"{len(program.instructions)} lists of instructions for {program.ranks} ranks")
    if sum(program.micro_batches_of(place.chunk) for place in program.placement.holders(0)) != program.micro_batches:
        raise ProgramError(f"{program.micro_batches} micro-batches cannot be halved between two directions")
    for rank, instructions in enumerate(program.instructions):
        _check_counts(program, rank, instructions)
        _check_order(program, rank, instructions)
        _check_weight_gradients(rank, instructions)
    simulate_program(program, UnitTimes())
    return tuple(max(alive, default=0) for alive in in_flight(program))


def _check_counts(program: Program, rank: int, instructions: tuple[Instruction, ...]) -> None:
    forwards, backwards, weights = Counter[MicroBatchWork](), Counter[MicroBatchWork](), Counter[MicroBatchWork]()
    for index, instruction in enumerate(instructions):
        for work in instruction.works:
            chunk_exists = 0 <= work.chunk < program.chunks
            if not chunk_exists or not 0 <= work.micro_batch < program.micro_batches_of(work.chunk):
                raise ProgramError(f"{where(rank, index, instruction)}: no such chunk or micro-batch")
        if instruction.forward is not None:
            forwards[instruction.forward] += 1
        if instruction.backward is not None:
            if instruction.op is not Op.W:
                backwards[instruction.backward] += 1
            if instruction.op is not Op.I:
                weights[instruction.backward] += 1
    named = (("forward", forwards), ("input gradient", backwards), ("weight gradient", weights))
    for chunk in range(program.chunks):
        for micro_batch in range(program.micro_batches_of(chunk)):
            for what, counts in named:
                times = counts[MicroBatchWork(chunk, micro_batch)]
                if times != 1:
                    raise ProgramError(
                        f"rank {rank}: {what} of chunk {chunk} micro-batch {micro_batch} {times} times instead of once"
                    )


def _check_order(program: Program, rank: int, instructions: tuple[Instruction, ...]) -> None:
    """What is made and needed on one rank: a backward after its forward, both ends of a local hand-over in order."""
    placement = program.placement
    forwards = {entry.forward: index for index, entry in enumerate(instructions) if entry.forward is not None}
    backwards = {
        entry.backward: index
        for index, entry in enumerate(instructions)
        if entry.backward is not None and entry.op is not Op.W
    }

    def needed(
        index: int, made: dict[MicroBatchWork, int], place: StagePlace | None, micro_batch: int, what: str
    ) -> None:
        if place is None or place.rank != rank:
            return
        if made[MicroBatchWork(place.chunk, micro_batch)] >= index:
            source = f"chunk {place.chunk} micro-batch {micro_batch}"
            raise ProgramError(f"{where(rank, index, instructions[index])}: needs the {what} of {source} before it")

    for work, index in forwards.items():
        needed(index, forwards, placement.before(StagePlace(rank, work.chunk)), work.micro_batch, "forward")
    for work, index in backwards.items():
        here = StagePlace(rank, work.chunk)
        needed(index, forwards, here, work.micro_batch, "forward")
        needed(index, backwards, placement.after(here), work.micro_batch, "gradient")


def _check_weight_gradients(rank: int, instructions: tuple[Instruction, ...]) -> None:
    pending: deque[MicroBatchWork | None] = deque()
    for index, instruction in enumerate(instructions):
        if instruction.op is Op.I:
            pending.append(instruction.backward)
        elif instruction.op is Op.W:
            if instruction.backward not in pending:
                raise ProgramError(f"{where(rank, index, instruction)}: before its I")
            first = pending.popleft()
            if instruction.backward != first:
                raise ProgramError(f"{where(rank, index, instruction)}: out of order, {first} has been pending longer")
