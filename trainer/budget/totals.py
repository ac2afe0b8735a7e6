"""A checkpoint and its ledger belong together: the totals that a checkpoint carries are checked when a run resumes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...comm.refusal import Problem, Refused
from .records import read_records
from .summary import summarise
from .terms import WORK_FILE
from .work import Work


def carry(work: Work, run_dir: Path, totals: Mapping[str, int | str]) -> None:
    """Check the ledger of `run_dir` against the `totals` of the checkpoint that the run resumes from.

    A ledger that holds the checkpoint's last record is its own. One without any step belongs to a checkpoint that was
    copied here: the totals are carried as one `inherited` record. Any other is of another run, or was cut: raises
    Refused, so that no GPU-hour is lost or counted twice.
    """
    records = read_records(run_dir / WORK_FILE)
    known = {hash_ for record in records for hash_ in (record["hash"], record.get("from_head"))}
    if totals["head"] in known:
        spent = summarise(run_dir).total_ms
        if spent < int(totals["gpu_ms"]):
            remedy = f"GPU-ms in the checkpoint, but only {spent} in the ledger; restore ledger/allocation.jsonl"
            raise Refused([Problem(str(run_dir / "ledger"), totals["gpu_ms"], remedy)])
    elif any(record["kind"] in ("step", "inherited") for record in records):
        remedy = "does not hold the checkpoint's last record; restore its ledger, or resume in a new run directory"
        raise Refused([Problem(str(run_dir / WORK_FILE), totals["head"], remedy)])
    else:
        work.inherit(totals)
