"""Instructions of a program, and the program as plain values."""

import pytest

from shoestring.parallelism.pipeline.program import ChunkMicroBatch, Instruction, Op, program_as_dict
from shoestring.parallelism.pipeline.schedules.registry import build_program


@pytest.mark.parametrize(
    ("op", "given"), [(Op.F, (False, True)), (Op.FB, (True, False)), (Op.W, (True, False)), (Op.B, (False, False))]
)
def test_an_instruction_has_the_works_of_its_op(op: Op, given: tuple[bool, bool]) -> None:
    works = [ChunkMicroBatch(0, 0) if there else None for there in given]
    with pytest.raises(ValueError, match=f"{op} with"):
        Instruction(op, *works)


def test_json_of_one_f_one_b_in_full() -> None:
    def one(op: str, micro_batch: int) -> dict[str, object]:
        return {"op": op, "chunk": 0, "micro_batch": micro_batch}

    assert program_as_dict(build_program("1f1b", 2, 2)) == {
        "schedule": "1f1b",
        "pp": 2,
        "micro_batches": 2,
        "ranks": [
            [one("F", 0), one("F", 1), one("B", 0), one("B", 1)],
            [one("F", 0), one("B", 0), one("F", 1), one("B", 1)],
        ],
    }


def test_json_of_dualpipe_counts_ranks_and_numbers_micro_batches_a_direction() -> None:
    tree = program_as_dict(build_program("dualpipe", 4, 8))
    ranks = tree["ranks"]
    assert (tree["pp"], tree["micro_batches"]) == (4, 8)
    assert isinstance(ranks, list)
    assert len(ranks) == 4
    assert ranks[0][0] == {"op": "F", "chunk": 0, "micro_batch": 0}
    assert ranks[3][0] == {"op": "F", "chunk": 1, "micro_batch": 0}
    assert ranks[0][7] == {
        "op": "FB",
        "forward": {"chunk": 0, "micro_batch": 3},
        "backward": {"chunk": 1, "micro_batch": 1},
    }
    works = [work for entry in ranks[1] for work in (entry, entry.get("forward", {}), entry.get("backward", {}))]
    assert {work["micro_batch"] for work in works if "micro_batch" in work} == set(range(4))
