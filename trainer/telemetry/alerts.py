"""Alerts: jumps of the loss and drops of the training speed."""

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
    """Comparison of each logged step with those before it; each problem is reported once until it is over."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=TRAILING_LOGGED_STEPS)
        self._rates: deque[float] = deque(maxlen=TRAILING_LOGGED_STEPS)
        self._active: set[str] = set()

    def check_logged_step(self, loss: float, tokens_per_second: float) -> Iterator[tuple[str, str]]:
        """Yield each new problem of this step as (`spike` or `stall`, a sentence)."""
        # A step with a problem is not added to the history, or it would shift what is usual.
        yield from self._check("spike", self._spike_message(loss), self._losses, loss)
        yield from self._check("stall", self._stall_message(tokens_per_second), self._rates, tokens_per_second)

    def _check(self, about: str, problem: str | None, before: deque[float], value: float) -> Iterator[tuple[str, str]]:
        if problem is None:
            before.append(value)
            self._active.discard(about)
        elif about not in self._active:
            self._active.add(about)
            yield about, problem

    def _spike_message(self, loss: float) -> str | None:
        """Return a sentence if the loss is half a nat, and five times the usual distance, above the trailing median."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if len(self._losses) < MIN_LOGGED_STEPS:
            return None
        usual = median(self._losses)
        spread = median(abs(value - usual) for value in self._losses)
        if loss - usual <= max(_SPIKE_NATS, _SPIKE_SPREADS * spread):
            return None
        return f"the loss has jumped to {loss:.3f}; the median of the {len(self._losses)} before is {usual:.3f}"

    def _stall_message(self, rate: float) -> str | None:
        """Return a sentence if the rate is at most half the trailing median."""
        if len(self._rates) < MIN_LOGGED_STEPS:
            return None
        usual = median(self._rates)
        if rate > _STALL_SHARE * usual:
            return None
        return f"{rate:,.0f} tokens/s, usually {usual:,.0f}"
