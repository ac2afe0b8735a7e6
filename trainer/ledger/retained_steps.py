"""Kept steps (those whose updates are in the weights) as columns of numbers: a long run has a million."""

from __future__ import annotations

import operator
from array import array
from collections import Counter
from collections.abc import Sequence
from typing import Any

MAX_STEPS_KEPT = 8192
"""Steps that a snapshot keeps individually; earlier ones are summed, since a run resumes from recent checkpoints."""


class StepNoLongerKept(Exception):  # noqa: N818 -- says what happened
    """Error for a rollback to a step that was summed: the ledger must be read from its beginning."""


class RetainedSteps:
    """Steps in order of their numbers: the last ones individually, earlier ones as sums. Times in GPU-ms."""

    def __init__(self) -> None:
        self._numbers = array("q")
        self._gpu_ms = array("q")
        self._tokens = array("q")
        self._phases = array("q")
        self._names: list[str] = []
        self._summed = 0
        """Number of steps that are kept only as sums."""
        self._floor = 0
        """Number of the last summed step."""
        self.gpu_ms = 0
        self.tokens: Counter[str] = Counter()
        """Tokens by phase."""

    def __len__(self) -> int:
        return self._summed + len(self._numbers)

    def extend(self, numbers: Sequence[int], gpu_ms: Sequence[int], tokens: Sequence[int], phase: str) -> bool:
        """Add steps if their numbers increase from the last one; return False and change nothing otherwise."""
        last = self._numbers[-1] if self._numbers else self._floor
        if not all(map(operator.lt, (last, *numbers), numbers)):
            return False
        if not numbers:
            return True
        self._numbers.extend(numbers)
        self._gpu_ms.extend(gpu_ms)
        self._tokens.extend(tokens)
        self._phases.extend([self._index(phase)] * len(numbers))
        self.gpu_ms += sum(gpu_ms)
        self.tokens[phase] += sum(tokens)
        return True

    def _index(self, phase: str) -> int:
        if phase not in self._names:
            self._names.append(phase)
        return self._names.index(phase)

    def append(self, number: int, gpu_ms: int, tokens: int, phase: str) -> None:
        """Add a step after the last one."""
        self._numbers.append(number)
        self._gpu_ms.append(gpu_ms)
        self._tokens.append(tokens)
        self._phases.append(self._index(phase))
        self.gpu_ms += gpu_ms
        self.tokens[phase] += tokens

    def roll_back_to(self, step: int) -> int:
        """Remove the steps after `step`; return their cost. Raises `StepNoLongerKept` for a summed step."""
        rolled_back_ms = 0
        while self._numbers and self._numbers[-1] > step:
            self._numbers.pop()
            gpu_ms, phase = self._gpu_ms.pop(), self._names[self._phases.pop()]
            self.gpu_ms -= gpu_ms
            self.tokens[phase] -= self._tokens.pop()
            rolled_back_ms += gpu_ms
        if self._summed and not self._numbers and self._floor > step:
            raise StepNoLongerKept
        return rolled_back_ms

    def recent_ms_per_token(self, last: int) -> list[float]:
        """Return the GPU-milliseconds per token of the last steps that have tokens."""
        pairs = zip(self._gpu_ms[-last:], self._tokens[-last:], strict=True)
        return [gpu_ms / tokens for gpu_ms, tokens in pairs if tokens]

    def comparable_totals(self) -> dict[str, Any]:
        """Return the totals that any two readers of one ledger agree on."""
        tokens = {phase: count for phase, count in sorted(self.tokens.items()) if count}
        return {"steps": len(self), "gpu_ms": self.gpu_ms, "tokens": tokens}

    def to_tree(self) -> dict[str, Any]:
        """Return plain values; steps before the last `MAX_STEPS_KEPT` are summed."""
        columns = (self._numbers, self._gpu_ms, self._tokens, self._phases)
        dropped = max(0, len(self._numbers) - MAX_STEPS_KEPT)
        return {
            "summed": self._summed + dropped,
            "floor": self._numbers[dropped - 1] if dropped else self._floor,
            "gpu_ms": self.gpu_ms,
            "tokens": dict(self.tokens),
            "phases": self._names,
            "steps": [list(column[dropped:]) for column in columns],
        }

    @staticmethod
    def from_tree(tree: dict[str, Any]) -> RetainedSteps:
        """Return the steps whose `to_tree` is `tree`."""
        made = RetainedSteps()
        columns = (array("q", column) for column in tree["steps"])
        made._numbers, made._gpu_ms, made._tokens, made._phases = columns
        made._names, made._summed, made._floor = tree["phases"], tree["summed"], tree["floor"]
        made.gpu_ms, made.tokens = tree["gpu_ms"], Counter(tree["tokens"])
        return made
