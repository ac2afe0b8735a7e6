"""Runs of one rank with a given duration, under one project."""

from dataclasses import replace
from pathlib import Path

from shoestring.tests.trainer.ledger.small_ledger import Time
from shoestring.trainer.ledger.config import BudgetConfig
from shoestring.trainer.ledger.work_journal import WorkJournal

BUDGET = BudgetConfig(gpu_hours=1.0)
HOUR = 3600


def run(
    run_dir: Path, time: Time, seconds: float, *, phase: str = "pre_train", steps: int = 1, first: int = 1
) -> WorkJournal:
    """Record an attempt of one rank that trains `steps` of 100 tokens in `seconds`."""
    work = WorkJournal(run_dir, ranks=1, attempt=f"{run_dir.name} {time.ns}", budget=replace(BUDGET, phase=phase))
    work.record_resume(first - 1)
    work.record_ready()
    for step in range(first, first + steps):
        time.pass_seconds(seconds / steps)
        work.record_step(step, 1000 * seconds / steps, 100)
    work.close()
    return work


def project_file(folder: Path, budgets: str = "{pre_train: 2.0, context_extension: 0.5}") -> Path:
    path = folder / "project.yaml"
    path.write_text(f"gpu_hours: {budgets}\nruns: [first, second, third]\n")
    return path
