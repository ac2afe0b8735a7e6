"""The steps that the weights hold, as numbers in columns: a run of months has a million of them."""

from __future__ import annotations

import operator
from array import array
from collections import Counter
from collections.abc import Sequence
from typing import Any

MAX_STEPS_KEPT = 8192
"""Steps that a snapshot keeps each; of those before it keeps the sums. A run goes back to its last checkpoints."""


class StepNoLongerKept(Exception):  # noqa: N818 -- says what happened
    """The run has gone back to a step of which only sums are kept: the ledger has to be read from its beginning."""


class RetainedSteps:
    """Steps in order of their numbers, the last ones each and what is before them as sums. Times in GPU-ms."""

    def __init__(self) -> None:
        self._numbers = array("q")
        self._gpu_ms = array("q")
        self._tokens = array("q")
        self._phases = array("q")
        self._names: list[str] = []
        self._summed = 0
        """How many steps are sums alone."""
        self._floor = 0
        """The number of the last of them."""
        self.gpu_ms = 0
        self.tokens: Counter[str] = Counter()
        """By phase."""

    def __len__(self) -> int:
        return self._summed + len(self._numbers)

    def extend(self, numbers: Sequence[int], gpu_ms: Sequence[int], tokens: Sequence[int], phase: str) -> bool:
        """Add steps if each comes after the last one; return whether they do, else nothing is changed."""
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
        """Remove the steps after `step`; return what they cost. Raises `StepNoLongerKept` where only a sum is known."""
        undone = 0
        while self._numbers and self._numbers[-1] > step:
            self._numbers.pop()
            gpu_ms, phase = self._gpu_ms.pop(), self._names[self._phases.pop()]
            self.gpu_ms -= gpu_ms
            self.tokens[phase] -= self._tokens.pop()
            undone += gpu_ms
        if self._summed and not self._numbers and self._floor > step:
            raise StepNoLongerKept
        return undone

    def recent_ms_per_token(self, last: int) -> list[float]:
        """GPU-milliseconds a token of each of the last steps; of a step without tokens there is none."""
        pairs = zip(self._gpu_ms[-last:], self._tokens[-last:], strict=True)
        return [gpu_ms / tokens for gpu_ms, tokens in pairs if tokens]

    def comparable_totals(self) -> dict[str, Any]:
        """What two readers of one ledger must agree on, whatever they keep of single steps."""
        tokens = {phase: count for phase, count in sorted(self.tokens.items()) if count}
        return {"steps": len(self), "gpu_ms": self.gpu_ms, "tokens": tokens}

    def to_tree(self) -> dict[str, Any]:
        """As plain values, without the steps before the last `MAX_STEPS_KEPT`."""
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
        """Return the inverse of `to_tree`."""
        made = RetainedSteps()
        columns = (array("q", column) for column in tree["steps"])
        made._numbers, made._gpu_ms, made._tokens, made._phases = columns
        made._names, made._summed, made._floor = tree["phases"], tree["summed"], tree["floor"]
        made.gpu_ms, made.tokens = tree["gpu_ms"], Counter(tree["tokens"])
        return made
