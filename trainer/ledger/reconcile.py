"""Reconciliation of the ledger with the scheduler's accounting and with an invoice; each difference is a line.

Slurm: the output of `sacct -X -P --format=JobID,Start,End,ElapsedRaw,AllocTRES`, more columns are welcome. Not yet
compared with a cluster that accounts for GPUs (`gres/gpu` in AllocTRES).
Invoices: CSV with a row per charge; the names of the columns for `gpu_hours` and `amount` are configurable.
"""

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...comm.errors import ConfigError, Problem
from ...comm.files.file_io import config_error_context, read_text
from .summary import LedgerSummary

_SACCT = ("JobID", "ElapsedRaw", "AllocTRES")
_GPUS = re.compile(r"(?:^|,)gres/gpu=([0-9]{1,9})(?:,|$)")
_MOST_BYTES = 2**30
_MOST = 1e15
"""Largest GPU-hours or amount of money."""


@dataclass(frozen=True)
class ReconciliationLine:
    """One line of a reconciliation."""

    name: str
    gpu_ms: int
    is_difference: bool = False
    """True for a part of the difference, False for one of the two sums."""


@dataclass(frozen=True)
class SchedulerJob:
    """Job in the scheduler's accounting."""

    name: str
    gpus: int
    seconds: int


def read_sacct_jobs(path: Path) -> list[SchedulerJob]:
    """Read the jobs from sacct output, without job steps. Raises `ConfigError` with all problems."""
    rows = _rows(path, "|", _SACCT)
    jobs, problems = [], []
    for number, row in rows:
        if "." in row["JobID"]:
            continue
        gpus = _GPUS.search(row["AllocTRES"])
        if gpus is None:
            problems.append(Problem(f"{path}:{number}, AllocTRES", row["AllocTRES"], "names no gres/gpu=N"))
        elif not re.fullmatch(r"[0-9]{1,15}", row["ElapsedRaw"]):
            problems.append(Problem(f"{path}:{number}, ElapsedRaw", row["ElapsedRaw"], "must be whole seconds"))
        else:
            jobs.append(SchedulerJob(row["JobID"], int(gpus[1]), int(row["ElapsedRaw"])))
    if problems:
        raise ConfigError(problems)
    return jobs


def reconcile_jobs(summary: LedgerSummary, jobs: Sequence[SchedulerJob]) -> list[ReconciliationLine]:
    """Return the lines from the jobs' GPU time to the ledger's allocated time; the differences add up.

    An attempt belongs to the job that it was started in. A job may have more GPUs than ranks, and holds them before,
    between and after attempts.
    """
    lines = [ReconciliationLine("scheduler", sum(job.gpus * job.seconds * 1000 for job in jobs))]
    for job in jobs:
        held = [launch for launch in summary.attempt_usages if launch.job == job.name]
        whole_ms = job.gpus * job.seconds * 1000
        if not held:
            lines.append(ReconciliationLine(f"job {job.name}: no attempt of this run", -whole_ms, True))
            continue
        used_ms = sum(launch.gpu_ms for launch in held)
        # An attempt with fewer ranks than the job has GPUs leaves the others idle while it lasts.
        lasted_ms = sum(launch.milliseconds for launch in held)
        idle_ms = lasted_ms * job.gpus - used_ms
        lines.append(ReconciliationLine(f"job {job.name}: GPUs without a rank", -idle_ms, True))
        around = f"job {job.name}: before, between and after its attempts"
        lines.append(ReconciliationLine(around, lasted_ms * job.gpus - whole_ms, True))
    named = {job.name for job in jobs}
    for launch in summary.attempt_usages:
        if launch.job not in named:
            where = "outside of any job" if launch.job is None else f"job {launch.job} is not in the accounting"
            lines.append(ReconciliationLine(f"attempt {launch.attempt}: {where}", launch.gpu_ms, True))
    lines.append(ReconciliationLine("ledger", summary.allocated_ms))
    return lines


@dataclass(frozen=True)
class Invoice:
    """Sums of an invoice."""

    gpu_hours: float
    amount: float


def read_invoice(path: Path, columns: Mapping[str, str]) -> Invoice:
    """Sum the CSV at `path`; `columns` maps `gpu_hours` and `amount` to its column names. Raises `ConfigError`."""
    names = {key: columns.get(key, key) for key in ("gpu_hours", "amount")}
    rows = _rows(path, ",", tuple(names.values()))
    sums, problems = dict.fromkeys(names, 0.0), []
    for number, row in rows:
        for key, name in names.items():
            try:
                found = float(row[name].replace("$", "").replace(",", ""))
                if not abs(found) < _MOST:
                    raise ValueError(found)
                sums[key] += found
            except ValueError:
                problems.append(Problem(f"{path}:{number}, {name}", row[name], "must be a number"))
    if problems:
        raise ConfigError(problems)
    return Invoice(**sums)


def reconcile_invoice(summary: LedgerSummary, invoice: Invoice) -> list[ReconciliationLine]:
    """Return the lines from the invoice to the ledger, in GPU-milliseconds."""
    invoiced_ms = round(invoice.gpu_hours * 3_600_000)
    billed = summary.allocated_ms - invoiced_ms
    name = "invoiced but not in the ledger" if billed <= 0 else "in the ledger but not invoiced"
    return [
        ReconciliationLine("invoice", invoiced_ms),
        ReconciliationLine(name, billed, True),
        ReconciliationLine("ledger", summary.allocated_ms),
    ]


def describe_invoice_price(invoice: Invoice, usd_per_gpu_hour: float) -> str:
    """Return a sentence that compares the invoice's price with the expected one."""
    each = invoice.amount / invoice.gpu_hours if invoice.gpu_hours else 0.0
    expected = invoice.gpu_hours * usd_per_gpu_hour
    difference = f"{invoice.amount - expected:+,.2f} against ${expected:,.2f} at ${usd_per_gpu_hour:g}"
    return f"invoiced ${invoice.amount:,.2f}, ${each:.4g} per GPU-hour: {difference}"


def _rows(path: Path, delimiter: str, needed: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Return the rows below the header, with their line numbers."""
    with config_error_context(path, "name another file"):
        lines = read_text(path, _MOST_BYTES).removeprefix("\ufeff").splitlines()
    reader = csv.DictReader(lines, delimiter=delimiter)
    try:
        missing = [name for name in needed if name not in (reader.fieldnames or ())]
        if missing:
            has = ", ".join(reader.fieldnames or ("nothing",))
            raise ConfigError([Problem(f"{path}:1", has, f"lacks the column {name!r}") for name in missing])
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise ConfigError([Problem(f"{path}:{reader.line_num}", None, f"is no line of a table: {error}")]) from error
    return ((number, {key: value or "" for key, value in row.items() if key is not None}) for number, row in rows)
