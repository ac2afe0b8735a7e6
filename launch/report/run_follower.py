"""Looking at a run from outside while it goes on, time and again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...comm.errors import ConfigError
from ...comm.files.line_reader import FileReplacedError
from ...trainer.ledger.allocation_journal import read_heartbeat
from ...trainer.ledger.clock import Instant
from ...trainer.ledger.summary import LedgerReader, LedgerSummary
from ...trainer.telemetry.downsample import open_tail_reader
from ...trainer.telemetry.events import METRICS_FILE, Event
from ...trainer.telemetry.history import MetricsHistory, MetricsReader


@dataclass(frozen=True)
class RunSnapshot:
    """What could be seen of a run at one moment."""

    run_dir: Path
    events: Sequence[Event]
    """The last ones that still hold, in order."""
    summary: LedgerSummary | None
    """Of its ledger; None where there is none to be read."""
    seconds_since_heartbeat: float | None
    """Since the last sign of life of its launcher; None where it has left none."""

    def last_event(self, kind: str) -> Event | None:
        """The last event of a kind."""
        return next((event for event in reversed(self.events) if event.kind == kind), None)

    @property
    def has_ended(self) -> bool:
        """Whether its GPUs have been given back, or, where no ledger says, it has told of its end."""
        if self.summary is not None:
            return not self.summary.is_running
        return bool(self.events) and self.events[-1].kind == "stop"


_MOST_EVENTS = 10_000
"""A frame shows the last of each kind and the losses of some dozen steps."""


class RunFollower:
    """Reads what is new in the directory of a run, of a long one from its last part on.

    A directory that another run has begun anew is read anew.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._begin()

    def _begin(self) -> None:
        path = self._run_dir / METRICS_FILE
        self._metrics = MetricsReader(path, open_tail_reader(path))
        self._history = MetricsHistory(most=_MOST_EVENTS)
        self._ledger = LedgerReader(self._run_dir)

    def poll(self) -> RunSnapshot:
        """As of now. Raises `ConfigError` for a broken line of metrics."""
        try:
            self._history.add_events(self._metrics.new_events())
        except (FileReplacedError, FileNotFoundError):
            self._begin()
        return RunSnapshot(self._run_dir, self._history.events, self._summary(), self._silent())

    def _summary(self) -> LedgerSummary | None:
        """None also for a ledger that is broken: `shoestring budget` says where, and watching goes on without."""
        try:
            return self._ledger.summarize()
        except ConfigError:
            self._ledger = LedgerReader(self._run_dir)  # the one that has refused is not to be used again
            return None

    def _silent(self) -> float | None:
        heartbeat = read_heartbeat(self._run_dir)
        return None if heartbeat is None else Instant.now().ns_since(Instant.from_record(heartbeat)) / 1e9
