"""A ledger of four ranks under a manual clock."""

import json
from pathlib import Path
from typing import Any

import pytest

from shoestring.trainer.ledger.allocation_journal import AllocationJournal
from shoestring.trainer.ledger.clock import Instant
from shoestring.trainer.ledger.config import BudgetConfig
from shoestring.trainer.ledger.journal import JournalReader
from shoestring.trainer.ledger.summary import LedgerSummary
from shoestring.trainer.ledger.work_journal import WorkJournal

BUDGET = BudgetConfig(gpu_hours=0.5)
RANKS = 4
NEVER = 1e6


class Time:
    """A clock that a test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ns = 1_000_000_000
        monkeypatch.setattr(Instant, "now", lambda: Instant(self.ns + 5, self.ns, "boot"))

    def pass_ms(self, milliseconds: float) -> None:
        self.ns += int(milliseconds * 1e6)

    def pass_seconds(self, seconds: float) -> None:
        self.ns += round(seconds * 1e9)


def launch(run_dir: Path, attempt: str) -> AllocationJournal:
    return AllocationJournal(run_dir, ranks=RANKS, attempt=attempt, budget=BUDGET, heartbeat_seconds=NEVER)


def begin(run_dir: Path, attempt: str) -> WorkJournal:
    return WorkJournal(run_dir, ranks=RANKS, attempt=attempt, budget=BUDGET)


def do_steps(work: WorkJournal, time: Time, first: int, last: int, milliseconds: float = 100) -> None:
    for step in range(first, last + 1):
        time.pass_ms(milliseconds)
        work.record_step(step, milliseconds, tokens=1000)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Return the records of a journal as they stand in its lines, which must be chained."""
    return [json.loads(line) for line in JournalReader(path).stream_lines()]


def everything(summary: LedgerSummary) -> int:
    return (
        summary.productive_ms
        + summary.rolled_back_ms
        + sum(summary.gpu_ms_by_bucket.values())
        + summary.unattributed_ms
    )


OPENING_OF_FORMAT_1 = (
    '{"attempt":"20260801-0900","boot":"b1","budget_gpu_hours":0.5,"hash":'
    '"667352fc3c634e09c32a00618b0384fc7ff475e7d86f299151f016b6df258e6f",'
    '"kind":"open","monotonic_ns":1,"phase":"pre_train","ranks":4,"wall_ns":1790000000000000000}\n'
)
"""Ledger as version 0.1.0 wrote it, before ledgers had a format number."""
