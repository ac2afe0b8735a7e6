"""Instructions of a program, and the compute of each."""

from __future__ import annotations

import pytest

from shoestring.parallelism.pipeline.program import ChunkMicroBatch, Instruction, Op


@pytest.mark.parametrize(
    ("op", "given"), [(Op.F, (False, True)), (Op.FB, (True, False)), (Op.W, (True, False)), (Op.B, (False, False))]
)
def test_an_instruction_has_the_works_of_its_op(op: Op, given: tuple[bool, bool]) -> None:
    works = [ChunkMicroBatch(0, 0) if there else None for there in given]
    with pytest.raises(ValueError, match=f"{op} with"):
        Instruction(op, *works)
