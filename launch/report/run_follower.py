"""Follower of a run directory: repeated snapshots while the run continues."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ...comm.errors import ConfigError, UnsupportedFormatConfigError
from ...comm.files.line_reader import FileReplacedError
from ...trainer.ledger.allocation_journal import read_heartbeat
from ...trainer.ledger.clock import Instant
from ...trainer.ledger.summary import LedgerReader, LedgerSummary
from ...trainer.telemetry.downsample import open_tail_reader
from ...trainer.telemetry.events import METRICS_FILE, Event, RunStopped
from ...trainer.telemetry.history import MetricsHistory, MetricsReader, check_metrics_format

E = TypeVar("E", bound=Event)


@dataclass(frozen=True)
class RunSnapshot:
    """Snapshot of a run."""

    run_dir: Path
    events: Sequence[Event]
    """Latest events in order, without undone ones."""
    summary: LedgerSummary | None
    """Ledger summary; None if there is no readable ledger."""
    seconds_since_heartbeat: float | None
    """Seconds since the launcher's last heartbeat; None if there is none."""

    def last_event(self, cls: type[E]) -> E | None:
        """Return the last event of a kind, or None."""
        return next((event for event in reversed(self.events) if isinstance(event, cls)), None)

    @property
    def has_ended(self) -> bool:
        """True if the run's GPUs are released; without a ledger, if its last event is `stop`."""
        if self.summary is not None:
            return not self.summary.is_running
        return bool(self.events) and isinstance(self.events[-1], RunStopped)


_MOST_EVENTS = 10_000
"""Events kept: a frame shows the last of each kind and the losses of a few dozen steps."""


class RunFollower:
    """Incremental reader of a run directory; of a long run it reads the last part.

    It starts again when another run replaces the directory's files.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._begin()

    def _begin(self) -> None:
        path = self._run_dir / METRICS_FILE
        check_metrics_format(path)
        self._metrics = MetricsReader(path, open_tail_reader(path))
        self._history = MetricsHistory(most=_MOST_EVENTS)
        self._ledger = LedgerReader(self._run_dir)

    def poll(self) -> RunSnapshot:
        """Return a snapshot of the present state. Raises `ConfigError` for a damaged metrics line or another format."""
        try:
            self._history.add_events(self._metrics.new_events())
        except (FileReplacedError, FileNotFoundError):
            self._begin()
        return RunSnapshot(self._run_dir, self._history.events, self._summary(), self._silent())

    def _summary(self) -> LedgerSummary | None:
        """Return the ledger's summary, or None if it is missing or damaged (`shoestring budget` says where)."""
        try:
            return self._ledger.summarize()
        except UnsupportedFormatConfigError:
            raise
        except ConfigError:
            self._ledger = LedgerReader(self._run_dir)  # a reader that failed cannot be reused
            return None

    def _silent(self) -> float | None:
        heartbeat = read_heartbeat(self._run_dir)
        return None if heartbeat is None else Instant.now().ns_since(heartbeat) / 1e9
