"""`shoestring budget`: cost of a run or project, what-ifs, and reconciliation with scheduler and invoice."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from ... import __version__
from ...comm.errors import ConfigError, Problem, raise_if_any
from ...comm.units import parse_token_count
from ...trainer.ledger.checkpoint_totals import ledger_problems
from ...trainer.ledger.project import Project, ProjectReader, ProjectTotals
from ...trainer.ledger.reconcile import (
    Invoice,
    ReconciliationLine,
    describe_invoice_price,
    read_invoice,
    read_sacct_jobs,
    reconcile_invoice,
    reconcile_jobs,
    render_reconciliation,
)
from ...trainer.ledger.render import render_ledger, render_project, render_what_if, what_if_gpu_hours
from ...trainer.ledger.snapshot import snapshot_problem
from ...trainer.ledger.summary import LedgerSummary, summarize_ledger, summarize_verified_ledger
from ...trainer.ledger.terms import PUBLISHED_USD_PER_GPU_HOUR, SNAPSHOT_FILE, to_gpu_hours
from ..console import print_to_stderr


@dataclass(frozen=True)
class BudgetQuery:
    """Options of the verb, as on the command line."""

    run_or_project: Path
    """Directory of a run, or a project file."""
    tokens: str | None
    gpus: int | None
    usd_per_gpu_hour: float | None
    sacct: Path | None
    invoice: Path | None
    invoice_columns: str
    against: Path | None
    """Plan file to compare with."""
    verify: bool = False
    """True: read every record of the ledger instead of the saved totals."""

    @property
    def price_per_gpu_hour(self) -> float:
        """USD per GPU-hour."""
        return PUBLISHED_USD_PER_GPU_HOUR if self.usd_per_gpu_hour is None else self.usd_per_gpu_hour

    @property
    def is_project(self) -> bool:
        """True for a project file, which lists several runs."""
        return self.run_or_project.is_file()

    def validate(self) -> None:
        """Raise `ConfigError` with every problem of the options."""
        raise_if_any(self._problems())

    def _problems(self) -> Iterator[Problem]:
        if self.is_project:
            asked = {
                "--tokens": self.tokens,
                "--sacct": self.sacct,
                "--invoice": self.invoice,
                "--against": self.against,
                "--verify": self.verify or None,
            }
            for option, value in asked.items():
                if value is not None:
                    yield Problem(option, str(value), "is for one run; name a run's directory, not a project")
        if (self.tokens is None) != (self.gpus is None):
            given = "--tokens" if self.gpus is None else "--gpus"
            yield Problem(given, self.tokens or self.gpus, "needs the other: --tokens 14.8T --gpus 2048")
        if self.gpus is not None and self.gpus < 1:
            yield Problem("--gpus", self.gpus, "must be at least 1")
        if not (self.price_per_gpu_hour >= 0 and math.isfinite(self.price_per_gpu_hour)):
            yield Problem("--usd-per-gpu-hour", self.price_per_gpu_hour, "must be at least 0 and finite")


def budget_tables(question: BudgetQuery) -> Iterator[RenderableType]:
    """Yield the answer as tables. Raises `ConfigError` for a damaged ledger, a wrong file or a wrong option."""
    question.validate()
    if question.is_project:
        project = Project.read(question.run_or_project)
        yield render_project(project, ProjectReader(project).summarize_runs(), question.price_per_gpu_hour)
        return
    summary = _summary(question)
    comparisons, invoice = _comparisons(question, summary), _invoice(question)
    plan = (
        None
        if question.against is None
        else _against(question.run_or_project, summary, question.against, as_json=False)
    )
    yield render_ledger(summary, question.price_per_gpu_hour)
    if question.verify:
        yield f"Verified all {summary.num_records:,} work records; {_saved(question.run_or_project)}."
    if plan is not None:
        yield plan
    if question.tokens is not None and question.gpus is not None:
        tokens = parse_token_count(question.tokens, "--tokens")
        yield render_what_if(summary, tokens, question.gpus, question.price_per_gpu_hour)
    for title, lines in comparisons.items():
        yield render_reconciliation(title, lines)
    if invoice is not None:
        yield describe_invoice_price(invoice, question.price_per_gpu_hour)


def budget_as_dict(question: BudgetQuery) -> dict[str, object]:
    """Return the answer as plain values."""
    question.validate()
    if question.is_project:
        return _project_tree(Project.read(question.run_or_project))
    summary = _summary(question)
    tree = summary.to_json() | {"version": __version__, "usd": summary.gpu_hours * question.price_per_gpu_hour}
    if question.tokens is not None and question.gpus is not None:
        needed = what_if_gpu_hours(summary, parse_token_count(question.tokens, "--tokens"))
        tree["what_if"] = {
            name: {"gpu_hours": hours, "days": hours / question.gpus / 24, "usd": hours * question.price_per_gpu_hour}
            for name, hours in needed.items()
        }
    if question.against is not None:
        tree["against"] = _against(question.run_or_project, summary, question.against, as_json=True)
    for title, lines in _comparisons(question, summary).items():
        tree[title] = [{"line": line.name, "gpu_ms": line.gpu_ms} for line in lines]
    invoice = _invoice(question)
    return tree if invoice is None else tree | {"invoice": asdict(invoice)}


def _summary(question: BudgetQuery) -> LedgerSummary:
    """Return the run's summary; with `--verify` from all records, which must agree with totals and checkpoint."""
    if question.verify:
        raise_if_any(_missing_for_checkpoint(question.run_or_project))
        return summarize_verified_ledger(question.run_or_project)
    summary, problem = summarize_ledger(question.run_or_project), snapshot_problem(question.run_or_project)
    if problem is not None:
        print_to_stderr(f"shoestring budget: {problem}")
    return summary


def _missing_for_checkpoint(run_dir: Path) -> Iterator[Problem]:
    """Yield records that the last checkpoint counts and the ledger lacks; a resume would be refused for them."""
    from ...trainer.checkpoint.store import CheckpointStore  # imports torch, which takes seconds

    checkpoint, _ = CheckpointStore(run_dir / "checkpoints", keep_last=1).open_last_intact()
    if checkpoint is not None and "ledger" in checkpoint.manifest.metadata:
        yield from ledger_problems(run_dir, checkpoint.manifest.metadata["ledger"])


def _saved(run_dir: Path) -> str:
    """Return whether there are saved totals that agree."""
    is_there = (run_dir / SNAPSHOT_FILE).exists()
    return "the saved totals agree" if is_there else "there are no saved totals to compare with"


def _project_tree(project: Project) -> dict[str, object]:
    summaries = ProjectReader(project).summarize_runs()
    totals = ProjectTotals.from_summaries(project, summaries)
    return {
        "version": __version__,
        "gpu_hours": to_gpu_hours(totals.allocated_ms),
        "phase_gpu_hours": {phase: to_gpu_hours(spent) for phase, spent in totals.gpu_ms_by_phase.items()},
        "budget_gpu_hours": dict(project.gpu_hours),
        "tokens_retained": dict(totals.tokens_by_phase),
        "foreign_gpu_hours": to_gpu_hours(totals.inherited_from_others_ms),
        "runs": {str(run): summary.to_json() for run, summary in summaries.items()},
    }


def _comparisons(question: BudgetQuery, summary: LedgerSummary) -> dict[str, Sequence[ReconciliationLine]]:
    found: dict[str, Sequence[ReconciliationLine]] = {}
    if question.sacct is not None:
        found["scheduler and ledger"] = reconcile_jobs(summary, read_sacct_jobs(question.sacct))
    invoice = _invoice(question)
    if invoice is not None:
        found["invoice and ledger"] = reconcile_invoice(summary, invoice)
    return found


def _against(run_dir: Path, summary: LedgerSummary, plan: Path, *, as_json: bool) -> Any:
    """Return the comparison with a plan as a table or as plain values."""
    from .plan_comparison import compare_with_plan, comparison_as_dict, comparison_table

    return (comparison_as_dict if as_json else comparison_table)(compare_with_plan(run_dir, summary, plan))


def _invoice(question: BudgetQuery) -> Invoice | None:
    return None if question.invoice is None else read_invoice(question.invoice, _columns(question.invoice_columns))


def _columns(text: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    wrong = [key for key, sign, name in pairs if key not in ("gpu_hours", "amount") or not sign or not name]
    if wrong:
        hint = "must be of the form gpu_hours=NAME,amount=NAME"
        raise ConfigError([Problem("--invoice-columns", text, hint)])
    return {key: name for key, _, name in pairs}
