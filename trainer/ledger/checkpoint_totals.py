"""Check, at a resume, that the ledger fits the totals in the checkpoint."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from ...comm.errors import ConfigError, Problem, raise_if_any
from .journal import GENESIS_HASH, contains_any, contains_record
from .terms import ALLOCATION_FILE, WORK_FILE
from .work_journal import WorkJournal


def ledger_problems(run_dir: Path, totals: Mapping[str, int | str]) -> Iterator[Problem]:
    """Yield a problem if the ledger of `run_dir` lacks one of the records that the checkpoint's `totals` name."""
    # A checkpoint that was copied to a new directory comes without a ledger: then both records are missing, which is
    # no problem.
    work, allocation = run_dir / WORK_FILE, run_dir / ALLOCATION_FILE
    head, opened = str(totals["head"]), str(totals.get("allocation_head", GENESIS_HASH))
    has_work, is_launched = contains_record(work, head), opened != GENESIS_HASH
    has_allocation = is_launched and contains_record(allocation, opened)
    carried = f"or remove {work.parent}: the run then carries the cost of the checkpoint"
    if has_work and is_launched and not has_allocation:
        hint = f"does not hold the attempt that saved the checkpoint; restore it, {carried}"
        yield Problem(str(allocation), opened, hint)
    elif has_allocation and not has_work:
        hint = f"does not hold the checkpoint's last record, and {allocation.name} does hold its attempt"
        yield Problem(str(work), head, f"{hint}; restore it, {carried}")


def carry_checkpoint_totals(work: WorkJournal, run_dir: Path, totals: Mapping[str, int | str]) -> None:
    """Check the ledger of `run_dir` against the `totals` of the checkpoint that the run resumes from.

    A ledger with the checkpoint's last record belongs to it. A ledger without any step belongs to a copied checkpoint:
    the totals become one `inherited` record. Any other ledger is of another run or was truncated: raises `ConfigError`,
    so that no GPU-hour is lost or counted twice.
    """
    raise_if_any(ledger_problems(run_dir, totals))
    path = run_dir / WORK_FILE
    if contains_any(path, str(totals["head"]).encode()):
        spent = work.ledger.summarize().total_ms
        if spent < int(totals["gpu_ms"]):
            hint = f"GPU-ms in the checkpoint, but only {spent} in the ledger; restore ledger/allocation.jsonl"
            raise ConfigError([Problem(str(run_dir / "ledger"), totals["gpu_ms"], hint)])
    elif contains_any(path, b'"kind":"step"', b'"kind":"inherited"'):
        hint = "does not hold the checkpoint's last record; restore its ledger, or resume in a new run directory"
        raise ConfigError([Problem(str(path), totals["head"], hint)])
    else:
        work.record_inherited_totals(totals)
