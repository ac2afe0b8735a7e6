"""Incidents section of a report: warnings, attempts that ended early, undone steps."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from ...comm.files.file_io import config_error_context, open_regular_file, read_bounded_lines
from ...trainer.ledger.journal import JournalReader
from ...trainer.ledger.record_batch import stream_records
from ...trainer.ledger.records import AttemptClosed, Resumed, StepDone, parse_record
from ...trainer.ledger.terms import ALLOCATION_FILE, WORK_FILE
from ...trainer.telemetry.events import Event, RunStopped, WarningRaised
from ..answers.blocks import Block, Cell, MissingDataNotice, Paragraph, number, table
from .run_record import RunRecord


@dataclass(frozen=True)
class Incident:
    """One incident of a run."""

    time: float
    """Seconds since the epoch."""
    step: int | None
    category: str
    text: str


def incidents_section(record: RunRecord) -> Iterator[Block]:
    """Yield the table of all incidents, in order of time."""
    found = collect_incidents(record)
    if not found:
        if not record.events and record.summary is None:
            yield MissingDataNotice("Nothing is recorded yet.")
        else:
            yield Paragraph("None: no warning, no undone step, no attempt that ended early.")
        return
    lines: list[tuple[Cell, ...]] = [
        (_clock(each.time), "" if each.step is None else number(each.step), each.category, each.text) for each in found
    ]
    yield table("", ("time", "step", "category", "message"), lines)


def collect_incidents(record: RunRecord) -> list[Incident]:
    """Collect the incidents from the event log, and from the ledger if it is readable."""
    found = [*_of_events(record.events)]
    if record.summary is not None:
        said = {incident.text for incident in found}
        found += [each for each in _of_launches(record.run_dir) if each.text not in said]
        found += _undone(record.run_dir / WORK_FILE)
    return sorted(found, key=lambda incident: incident.time)


def _of_events(events: Sequence[Event]) -> Iterator[Incident]:
    for event in events:
        match event:
            case WarningRaised():
                yield Incident(event.time, event.step, event.about, event.message)
            case RunStopped() if event.reason != "done":
                yield Incident(event.time, event.step, "stop", event.reason)


def _of_launches(run_dir: Path) -> Iterator[Incident]:
    """Yield attempts that did not complete the run; the launcher's reason for one that did is `196 steps done`."""
    for record in stream_records(JournalReader(run_dir / ALLOCATION_FILE)):
        if isinstance(record, AttemptClosed) and not record.reason.endswith("steps done"):
            yield Incident(record.wall_ns / 1e9, None, "launch", record.reason)


def _undone(path: Path) -> Iterator[Incident]:
    """Yield the resumed attempts, with the step they started from and the number of steps undone.

    A long run's journal is scanned as text; only its resume records and the step before each are parsed.
    """
    if not path.exists():
        return
    last = b""
    with config_error_context(path, "restore the file"), open_regular_file(path) as file:
        for line in read_bounded_lines(file):
            if not line.endswith(b"\n"):
                return
            if b'"kind":"step"' in line:
                last = line
            elif b'"kind":"resume"' in line:
                record, before = parse_record(line), parse_record(last) if last else None
                last = line
                if not isinstance(record, Resumed):
                    continue
                undone = before.step - record.step if isinstance(before, StepDone | Resumed) else 0
                text = f"resumed from step {record.step:,}" + (f"; {undone:,} steps undone" if undone > 0 else "")
                yield Incident(record.wall_ns / 1e9, record.step, "resume", text)


def _clock(time: float) -> str:
    return datetime.fromtimestamp(time).astimezone().strftime("%Y-%m-%d %H:%M:%S")
