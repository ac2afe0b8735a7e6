"""Running cost of a run, and budget enforcement: projection of the cost at its end, warnings and halts."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...comm.errors import collect_problems
from .clock import Instant
from .config import BudgetConfig
from .project import Project, ProjectReader
from .summary import TRAILING_STEPS, LedgerSummary
from .terms import to_gpu_hours

MIN_STEPS_TO_PROJECT = 20
"""Steps of this attempt before a cost is projected: the first ones warm up."""
_SECONDS_BETWEEN_READS = 60.0


@dataclass(frozen=True)
class BudgetAccount:
    """One budget of a run, in GPU-hours."""

    name: str
    """Configuration key that sets the limit."""
    spent: float
    limit: float
    projected: float | None
    """Projected cost at the end of the run; None after too few steps."""

    def halt_reason(self, stop_at: float | None) -> str | None:
        """Return why the run must halt, with a hint; None if it need not."""
        if self.spent >= self.limit:
            return f"the run has used {self.spent:.4g} GPU-hours and its budget is {self.limit:.4g}; {self._raise}"
        if stop_at is not None and self.projected is not None and self.projected > stop_at * self.limit:
            text = f"the run has used {self.spent:.4g} GPU-hours and is projected to use {self.projected:.4g}"
            return f"{text}, of a budget of {self.limit:.4g}; {self._raise}, or set budget.stop_at=null"
        return None

    @property
    def _raise(self) -> str:
        return f"raise {self.name} to continue"


def project_gpu_hours(spent: float, tokens_left: int, ms_per_token: float) -> float:
    """Return the projected GPU-hours: those spent, plus the tokens left at the cost of the median step."""
    return spent + to_gpu_hours(1) * ms_per_token * max(0, tokens_left)


def compute_budget_accounts(
    config: BudgetConfig, summary: LedgerSummary, run_dir: Path, tokens_left: int, ramp_steps: int = 0
) -> Iterator[BudgetAccount]:
    """Yield the accounts of a run that is not running: spent and projected GPU-hours for each budget."""
    # The first `ramp_steps` have smaller batches, whose cost per token does not apply to the steps left.
    least = ramp_steps + TRAILING_STEPS if ramp_steps else MIN_STEPS_TO_PROJECT
    rate = summary.step_ms_per_token if summary.steps_retained >= least else None
    spent, phase_spent = summary.gpu_hours, to_gpu_hours(summary.gpu_ms_by_phase.get(config.phase, 0))
    yield from _accounts(config, spent, phase_spent, gpu_hours_left_in_project(config, run_dir), tokens_left, rate)


def gpu_hours_left_in_project(config: BudgetConfig, run_dir: Path) -> float | None:
    """Return the GPU-hours that the other runs of the project leave for `run_dir`; None without a project."""
    if config.project is None:
        return None
    return ProjectReader(Project.read(Path(config.project))).gpu_hours_left(config.phase, run_dir)


def _accounts(
    config: BudgetConfig, spent: float, phase_spent: float, left: float | None, tokens: int, rate: float | None
) -> Iterator[BudgetAccount]:
    to_spend = None if rate is None else project_gpu_hours(0, tokens, rate)
    yield BudgetAccount("budget.gpu_hours", spent, config.gpu_hours, None if to_spend is None else spent + to_spend)
    if left is not None:
        name = f"gpu_hours.{config.phase} in {config.project}"
        yield BudgetAccount(name, phase_spent, left, None if to_spend is None else phase_spent + to_spend)


class CostMeter:
    """Running cost: the ledger's totals at the start of this attempt, plus the elapsed time of all ranks.

    Cheap enough to read at every step. `summary` is read after `carry_checkpoint_totals`.
    """

    def __init__(self, summary: LedgerSummary, *, ranks: int) -> None:
        self._start = Instant.now()
        self._before_ms = summary.total_ms
        self._phase_before_ms = summary.gpu_ms_by_phase[summary.phase]
        self._productive_ms = summary.productive_ms
        self._allocated_ms = summary.allocated_ms
        self._ranks = ranks

    def add_step(self, gpu_ms: int) -> None:
        """Add the cost of a finished step."""
        self._productive_ms += gpu_ms

    def gpu_hours(self) -> float:
        """Return the GPU-hours from the first attempt until now, including inherited ones."""
        return to_gpu_hours(self._before_ms + self._elapsed_ms())

    def phase_gpu_hours(self) -> float:
        """Return the GPU-hours of this run's attempts in the current phase."""
        return to_gpu_hours(self._phase_before_ms + self._elapsed_ms())

    def goodput(self) -> float:
        """Return the share of allocated time that was spent on kept steps."""
        return self._productive_ms / max(1, self._allocated_ms + self._elapsed_ms())

    def _elapsed_ms(self) -> int:
        return Instant.now().ns_since(self._start) // 1_000_000 * self._ranks


class BudgetGuard:
    """Budget check of a running run. Steps of earlier attempts do not count: their layout may have been another."""

    def __init__(self, config: BudgetConfig, meter: CostMeter, run_dir: Path) -> None:
        self._config, self.meter, self._run_dir = config, meter, run_dir
        self._rates: deque[float] = deque(maxlen=TRAILING_STEPS)
        self._project = None if config.project is None else ProjectReader(Project.read(Path(config.project)))
        self._left: float | None = None
        self._read_at: Instant | None = None
        self._has_warned = False

    def add_step(self, gpu_ms: int, tokens: int | None) -> None:
        """Add a finished step; without `tokens` its cost per token does not apply to the steps left."""
        self.meter.add_step(gpu_ms)
        if tokens is not None:
            self._rates.append(gpu_ms / tokens)

    def current_accounts(self, tokens_left: int) -> list[BudgetAccount]:
        """Return the accounts as of now."""
        rate = sorted(self._rates)[len(self._rates) // 2] if len(self._rates) >= MIN_STEPS_TO_PROJECT else None
        spent, phase_spent = self.meter.gpu_hours(), self.meter.phase_gpu_hours()
        return list(_accounts(self._config, spent, phase_spent, self._left_of_project(), tokens_left, rate))

    def halt_reason(self, tokens_left: int) -> str | None:
        """Return why the run must halt now, with a hint; None if it need not."""
        reasons = (account.halt_reason(self._config.stop_at) for account in self.current_accounts(tokens_left))
        return next((reason for reason in reasons if reason is not None), None)

    def new_warning(self, tokens_left: int) -> str | None:
        """Return a warning when the projection first comes near or past a budget, else None."""
        near = [
            f"projected cost at the end of the run: {account.projected:.4g} GPU-hours, "
            f"{account.projected / account.limit:.0%} of {account.name} = {account.limit:.4g}"
            for account in self.current_accounts(tokens_left)
            if account.projected is not None and account.projected > self._config.warn_at * account.limit > 0
        ]
        is_new = bool(near) and not self._has_warned
        self._has_warned = bool(near)
        return "; ".join(near) if is_new else None

    def _left_of_project(self) -> float | None:
        """Return the GPU-hours left in the project, read again once per minute."""
        if self._project is None:
            return None
        now = Instant.now()
        if self._left is None or self._read_at is None or now.ns_since(self._read_at) > _SECONDS_BETWEEN_READS * 1e9:
            self._read_at = now
            # A broken ledger of another run must not end this one.
            with collect_problems([]):
                self._left = self._project.gpu_hours_left(self._config.phase, self._run_dir)
        return self._left
