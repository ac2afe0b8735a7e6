"""What a person wants to be woken for: a loss that jumps, a run that has become slow."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from statistics import median

TRAILING_LOGGED_STEPS = 20
MIN_LOGGED_STEPS = 5
_SPIKE_NATS = 0.5
_SPIKE_SPREADS = 5.0
_STALL_SHARE = 0.5


class AlertMonitor:
    """Compares each logged step with those before it; says each trouble once, until it is over."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=TRAILING_LOGGED_STEPS)
        self._rates: deque[float] = deque(maxlen=TRAILING_LOGGED_STEPS)
        self._in_trouble: set[str] = set()

    def check_logged_step(self, loss: float, tokens_per_second: float) -> Iterator[tuple[str, str]]:
        """What is new about this step: (`spike` or `stall`, a sentence). A troubled step is not compared with later."""
        yield from self._judge("spike", self._spike(loss), self._losses, loss)
        yield from self._judge("stall", self._stall(tokens_per_second), self._rates, tokens_per_second)

    def _judge(self, about: str, trouble: str | None, before: deque[float], value: float) -> Iterator[tuple[str, str]]:
        if trouble is None:
            before.append(value)
            self._in_trouble.discard(about)
        elif about not in self._in_trouble:
            self._in_trouble.add(about)
            yield about, trouble

    def _spike(self, loss: float) -> str | None:
        """Above the trailing median by half a nat, and by five times the usual distance from it."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if len(self._losses) < MIN_LOGGED_STEPS:
            return None
        usual = median(self._losses)
        spread = median(abs(value - usual) for value in self._losses)
        if loss - usual <= max(_SPIKE_NATS, _SPIKE_SPREADS * spread):
            return None
        return f"the loss has jumped to {loss:.3f}; the median of the {len(self._losses)} before is {usual:.3f}"

    def _stall(self, rate: float) -> str | None:
        """Half the trailing median, or less."""
        if len(self._rates) < MIN_LOGGED_STEPS:
            return None
        usual = median(self._rates)
        if rate > _STALL_SHARE * usual:
            return None
        return f"{rate:,.0f} tokens a second, where {usual:,.0f} are usual"
