"""Kept steps (those whose updates are in the weights) as columns of numbers: a long run has a million."""

import operator
from array import array
from collections import Counter
from collections.abc import MutableSequence, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

from ...comm.files.strict_json import MAX_INTEGER, JsonValue

MAX_STEPS_KEPT = 8192
"""Steps that a snapshot keeps individually; earlier ones are summed, since a run resumes from recent checkpoints."""


class LedgerOutOfOrder(Exception):  # noqa: N818 -- says what happened
    """Error for a record that concerns what was summed or read before: the ledger must be read from its beginning."""


def _read_column(item: JsonValue) -> MutableSequence[int]:
    return array("q", [each.as_integer() for each in item.as_list()])


def _read_counts(item: JsonValue) -> Counter[str]:
    return Counter({key: value.as_integer(-MAX_INTEGER) for key, value in item.items()})


Counts = Annotated[Counter[str], _read_counts]
"""Numbers by name; below 0 where charged intervals overlap."""
_Column = Annotated[MutableSequence[int], _read_column]


def _make_column() -> MutableSequence[int]:
    return array("q")


@dataclass
class RetainedSteps:
    """Steps in order of their numbers: the last ones individually, earlier ones as sums. Times in GPU-ms.

    Two are equal if their sums are, whichever steps they keep individually.
    """

    count: int = 0
    gpu_ms: int = 0
    tokens: Counts = field(default_factory=Counter)
    """Tokens by phase."""
    floor: int = field(default=0, compare=False)
    """Lowest number of a step that is not summed."""
    phases: list[str] = field(default_factory=list, compare=False)
    """Names of the phases."""
    step_numbers: _Column = field(default_factory=_make_column, compare=False)
    step_gpu_ms: _Column = field(default_factory=_make_column, compare=False)
    step_tokens: _Column = field(default_factory=_make_column, compare=False)
    step_phases: _Column = field(default_factory=_make_column, compare=False)
    """Index of each step's phase in `phases`."""

    def extend(self, numbers: Sequence[int], gpu_ms: Sequence[int], tokens: Sequence[int], phase: str) -> bool:
        """Add steps if their numbers increase from the last one; return False and change nothing otherwise."""
        last = self.step_numbers[-1] if self.step_numbers else self.floor - 1
        if not all(map(operator.lt, (last, *numbers), numbers)):
            return False
        if phase not in self.phases:
            self.phases.append(phase)
        self.step_numbers.extend(numbers)
        self.step_gpu_ms.extend(gpu_ms)
        self.step_tokens.extend(tokens)
        self.step_phases.extend([self.phases.index(phase)] * len(numbers))
        self.count += len(numbers)
        self.gpu_ms += sum(gpu_ms)
        self.tokens[phase] += sum(tokens)
        return True

    def roll_back_to(self, step: int) -> int:
        """Remove the steps after `step`; return their cost. Raises `LedgerOutOfOrder` for a summed step."""
        before_ms = self.gpu_ms
        while self.step_numbers and self.step_numbers[-1] > step:
            self.step_numbers.pop()
            self.count -= 1
            self.gpu_ms -= self.step_gpu_ms.pop()
            self.tokens[self.phases[self.step_phases.pop()]] -= self.step_tokens.pop()
        if self.count and not self.step_numbers and self.floor > step + 1:
            raise LedgerOutOfOrder
        return before_ms - self.gpu_ms

    def recent_ms_per_token(self, last: int) -> list[float]:
        """Return the GPU-milliseconds per token of the last steps that have tokens."""
        pairs = zip(self.step_gpu_ms[-last:], self.step_tokens[-last:], strict=True)
        return [gpu_ms / tokens for gpu_ms, tokens in pairs if tokens]

    def without_early_steps(self) -> "RetainedSteps":
        """Return the same with the steps before the last `MAX_STEPS_KEPT` summed."""
        dropped = len(self.step_numbers) - MAX_STEPS_KEPT
        if dropped <= 0:
            return self
        return replace(
            self,
            floor=self.step_numbers[dropped - 1] + 1,
            step_numbers=self.step_numbers[dropped:],
            step_gpu_ms=self.step_gpu_ms[dropped:],
            step_tokens=self.step_tokens[dropped:],
            step_phases=self.step_phases[dropped:],
        )
