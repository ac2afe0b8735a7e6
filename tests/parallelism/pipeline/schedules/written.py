"""Programs as text and as counts of instructions."""

from shoestring.parallelism.pipeline.program import PipelineProgram


def written(program: PipelineProgram, rank: int) -> str:
    """Return the rank's program in short: small letters are chunk 1."""
    letters = []
    for instruction in program.instructions[rank]:
        for op, work in zip(instruction.op.value, instruction.chunk_micro_batches, strict=True):
            letters.append((op.lower() if work.chunk else op) + str(work.micro_batch))
        letters.append(" ")
    return "".join(letters).strip()
