"""The ledger against the scheduler and an invoice: each difference has a name, and the lines add up."""

from pathlib import Path

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.trainer.ledger.allocation_journal import AllocationJournal
from shoestring.trainer.ledger.clock import Instant
from shoestring.trainer.ledger.config import BudgetConfig
from shoestring.trainer.ledger.reconcile import (
    ReconciliationLine,
    describe_invoice_price,
    read_invoice,
    read_sacct_jobs,
    reconcile_invoice,
    reconcile_jobs,
)
from shoestring.trainer.ledger.summary import LedgerSummary, summarize_ledger

SACCT = """JobID|JobName|State|Start|End|ElapsedRaw|AllocTRES
41|train|COMPLETED|2026-11-25T10:00:00|2026-11-25T10:10:00|600|billing=8,cpu=64,gres/gpu=8,mem=1T,node=1
41.batch|batch|COMPLETED|2026-11-25T10:00:00|2026-11-25T10:10:00|600|cpu=64,gres/gpu=8
42|train|TIMEOUT|2026-11-25T11:00:00|2026-11-25T11:05:00|300|cpu=64,gres/gpu=8
43|other|FAILED|2026-11-25T12:00:00|2026-11-25T12:00:10|10|gres/gpu=16
"""


@pytest.fixture
def summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LedgerSummary:
    """Return the summary of two launches in job 41, one on half its GPUs in job 42, and one on a workstation."""
    seconds = 1
    monkeypatch.setattr(Instant, "now", lambda: Instant(seconds * 10**9, seconds * 10**9, "boot"))
    for attempt, job, ranks, length in (
        ("a", "41", 8, 200),
        ("b", "41", 8, 300),
        ("c", "42", 4, 290),
        ("d", None, 2, 50),
    ):
        allocation = AllocationJournal(
            tmp_path, ranks=ranks, attempt=attempt, budget=BudgetConfig(gpu_hours=1), job=job, heartbeat_seconds=1e6
        )
        seconds += length
        allocation.close("done")
        seconds += 5
    return summarize_ledger(tmp_path)


def written(folder: Path, text: str) -> Path:
    path = folder / "file"
    path.write_text(text)
    return path


def add_up(lines: list[ReconciliationLine]) -> None:
    first, *between, last = lines
    assert not first.is_difference
    assert not last.is_difference
    assert first.gpu_ms + sum(line.gpu_ms for line in between) == last.gpu_ms


def test_every_difference_from_the_scheduler_is_a_line(summary: LedgerSummary, tmp_path: Path) -> None:
    lines = reconcile_jobs(summary, read_sacct_jobs(written(tmp_path, SACCT)))
    add_up(lines)
    assert {line.name: line.gpu_ms / 1000 for line in lines} == {
        "scheduler": 8 * 600 + 8 * 300 + 16 * 10,
        "job 41: GPUs without a rank": 0,
        "job 41: before, between and after its attempts": -8 * 100,
        "job 42: GPUs without a rank": -4 * 290,
        "job 42: before, between and after its attempts": -8 * 10,
        "job 43: no attempt of this run": -160,
        "attempt d: outside of any job": 100,
        "ledger": 8 * 500 + 4 * 290 + 100,
    }


def test_a_job_that_the_accounting_lacks_is_a_line(summary: LedgerSummary, tmp_path: Path) -> None:
    lines = reconcile_jobs(summary, read_sacct_jobs(written(tmp_path, "\n".join(SACCT.splitlines()[:3]))))
    add_up(lines)
    assert ReconciliationLine("attempt c: job 42 is not in the accounting", 4 * 290_000, True) in lines


def test_an_invoice_is_compared_in_hours_and_in_money(summary: LedgerSummary, tmp_path: Path) -> None:
    path = written(tmp_path, 'item,Usage,Cost\nH800,1.25,"$2.50"\nH800,0.25,0.75\n')
    invoice = read_invoice(path, {"gpu_hours": "Usage", "amount": "Cost"})
    assert (invoice.gpu_hours, invoice.amount) == (1.5, 3.25)
    lines = reconcile_invoice(summary, invoice)
    add_up(lines)
    assert lines[1] == ReconciliationLine("invoiced but not in the ledger", 5_260_000 - 5_400_000, True)
    assert describe_invoice_price(invoice, 2) == "invoiced $3.25, $2.167 per GPU-hour: +0.25 against $3.00 at $2"


@pytest.mark.parametrize(
    ("text", "gist"),
    [
        ("JobID|Start\n1|x\n", "lacks the column 'ElapsedRaw'"),
        (SACCT.replace("gres/gpu=16", "cpu=3"), r"file:5, AllocTRES.*names no gres/gpu=N"),
        (SACCT.replace("|300|", "|5:00|"), r"file:4, ElapsedRaw"),
        ("", "lacks the column 'JobID'"),
    ],
)
def test_an_accounting_that_cannot_be_read_is_refused_by_line(text: str, gist: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=gist):
        read_sacct_jobs(written(tmp_path, text))


def test_an_invoice_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lacks the column 'amount'"):
        read_invoice(written(tmp_path, "gpu_hours,Cost\n1,2\n"), {})
    with pytest.raises(ConfigError, match=r"file:2, amount = 'two'"):
        read_invoice(written(tmp_path, "gpu_hours,amount\n1,two\n"), {})
    with pytest.raises(ConfigError, match="absent = None: cannot be used: No such file"):
        read_invoice(tmp_path / "absent", {})


def test_a_heading_without_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"field larger than field limit"):
        read_sacct_jobs(written(tmp_path, "JobID|" + "9" * 200_000))
