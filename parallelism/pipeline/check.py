"""Proof that a program computes a global batch and cannot deadlock."""

from collections import Counter, deque

from .communication import P2PTensorKind, iter_halves
from .program import (
    ChunkMicroBatch,
    Instruction,
    InvalidProgramError,
    Op,
    PipelineProgram,
    count_in_flight,
    describe_instruction,
)
from .simulate import OpDurations, simulate_program


def verify_program(program: PipelineProgram) -> tuple[int, ...]:
    """Raise `InvalidProgramError` unless `program` is valid; return the peak number of chunks in flight on each rank.

    Proved: on every rank each micro-batch has one F and one B, or one I and one W, in each chunk, alone or as half of
    an FB; every W comes after its I, in the order of the I's; a rank produces what its other chunk needs before that;
    under the rendezvous model (see `derive_p2p_batches`) every instruction runs. `count_in_flight` counts the chunks.
    """
    if len(program.instructions) != program.ranks:
        raise InvalidProgramError(f"{len(program.instructions)} lists of instructions for {program.ranks} ranks")
    if (
        sum(program.micro_batches_in_chunk(place.chunk) for place in program.placement.locations_of_stage(0))
        != program.num_micro_batches
    ):
        raise InvalidProgramError(f"{program.num_micro_batches} micro-batches cannot be halved between two directions")
    for rank, instructions in enumerate(program.instructions):
        _check_counts(program, rank, instructions)
        _check_order(program, rank, instructions)
        _check_weight_gradients(rank, instructions)
    # Last, because a simulation needs a complete program. It raises for a deadlock; any durations find one, since
    # whether a batch of messages is ever matched depends on the order of instructions alone.
    simulate_program(program, OpDurations())
    return tuple(max(alive, default=0) for alive in count_in_flight(program))


def _check_counts(program: PipelineProgram, rank: int, instructions: tuple[Instruction, ...]) -> None:
    forwards, backwards, weights = Counter[ChunkMicroBatch](), Counter[ChunkMicroBatch](), Counter[ChunkMicroBatch]()
    for index, instruction in enumerate(instructions):
        for work in instruction.chunk_micro_batches:
            chunk_exists = 0 <= work.chunk < program.chunks_per_rank
            if not chunk_exists or not 0 <= work.micro_batch < program.micro_batches_in_chunk(work.chunk):
                raise InvalidProgramError(
                    f"{describe_instruction(rank, index, instruction)}: no such chunk or micro-batch"
                )
        if instruction.forward is not None:
            forwards[instruction.forward] += 1
        if instruction.backward is not None:
            # B and FB count as both: an I without its W, or the reverse, shows as a count of 0 or 2.
            if instruction.op is not Op.W:
                backwards[instruction.backward] += 1
            if instruction.op is not Op.I:
                weights[instruction.backward] += 1
    named = (("forward", forwards), ("input gradient", backwards), ("weight gradient", weights))
    for chunk in range(program.chunks_per_rank):
        for micro_batch in range(program.micro_batches_in_chunk(chunk)):
            for what, counts in named:
                times = counts[ChunkMicroBatch(chunk, micro_batch)]
                if times != 1:
                    raise InvalidProgramError(
                        f"rank {rank}: {what} of chunk {chunk} micro-batch {micro_batch} {times} times instead of once"
                    )


def _check_order(program: PipelineProgram, rank: int, instructions: tuple[Instruction, ...]) -> None:
    """Check the order on one rank: backwards after their forwards, chunks that pass tensors to each other in order."""
    halves = [
        (index, half)
        for index, instruction in enumerate(instructions)
        for half in iter_halves(program.placement, rank, instruction)
    ]
    computed = {(half.tensor_kind, half.work): index for index, half in halves}
    for index, half in halves:
        needed = [(half.tensor_kind, half.source)]
        if half.tensor_kind is P2PTensorKind.GRADIENT:
            needed.insert(0, (P2PTensorKind.ACTIVATION, half.here))
        for kind, place in needed:
            if place is None or place.rank != rank:
                continue
            if computed[kind, ChunkMicroBatch(place.chunk, half.work.micro_batch)] >= index:
                what = "forward" if kind is P2PTensorKind.ACTIVATION else "gradient"
                source = f"chunk {place.chunk} micro-batch {half.work.micro_batch}"
                raise InvalidProgramError(
                    f"{describe_instruction(rank, index, instructions[index])}: needs the {what} of {source} before it"
                )


def _check_weight_gradients(rank: int, instructions: tuple[Instruction, ...]) -> None:
    pending: deque[ChunkMicroBatch | None] = deque()
    for index, instruction in enumerate(instructions):
        if instruction.op is Op.I:
            pending.append(instruction.backward)
        elif instruction.op is Op.W:
            if instruction.backward not in pending:
                raise InvalidProgramError(f"{describe_instruction(rank, index, instruction)}: before its I")
            # First in, first out, as in DeepSeek's WeightGradStore: the inputs that were kept longest are freed first.
            first = pending.popleft()
            if instruction.backward != first:
                raise InvalidProgramError(
                    f"{describe_instruction(rank, index, instruction)}: out of order, {first} has been pending longer"
                )
