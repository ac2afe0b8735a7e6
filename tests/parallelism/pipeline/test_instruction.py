"""Each instruction runs its halves, in this order."""

from dataclasses import dataclass

import pytest

from shoestring.parallelism.pipeline.instruction import Resumable, run_instruction
from shoestring.parallelism.pipeline.program import Op


@dataclass(frozen=True)
class Work:
    """Work that notes each of its steps; it launches one communication."""

    diary: list[str]

    def forward(self) -> Resumable[None]:
        self.diary.append("F begins")
        yield
        self.diary.append("F ends")

    def backward(self, *, deferred: bool) -> Resumable[None]:
        self.diary.append("I begins" if deferred else "B begins")
        yield
        self.diary.append("backward ends")

    def weight_gradients(self) -> None:
        self.diary.append("W")


@pytest.mark.parametrize(
    ("op", "overlap", "expected"),
    [
        (Op.F, True, ["F begins", "F ends"]),
        (Op.B, True, ["B begins", "backward ends"]),
        (Op.I, True, ["I begins", "backward ends"]),
        (Op.W, True, ["W"]),
        (Op.FB, True, ["B begins", "F begins", "backward ends", "F ends"]),
        (Op.FB, False, ["F begins", "F ends", "B begins", "backward ends"]),
    ],
)
def test_each_instruction_runs_its_halves(op: Op, overlap: bool, expected: list[str]) -> None:
    work = Work([])
    has_forward, has_backward = op in (Op.F, Op.FB), op is not Op.F
    run_instruction(op, work if has_forward else None, work if has_backward else None, overlap=overlap)
    assert work.diary == expected
