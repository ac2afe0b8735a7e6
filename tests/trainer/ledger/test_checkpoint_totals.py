"""A checkpoint continues with its own ledger, or brings its cost."""

import json
from pathlib import Path

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.tests.trainer.ledger.small_ledger import RANKS, Time, begin, do_steps, everything
from shoestring.trainer.ledger.checkpoint_totals import carry_checkpoint_totals
from shoestring.trainer.ledger.summary import summarize_ledger


def test_a_checkpoint_with_its_ledger_continues(tmp_path: Path, time: Time) -> None:
    work = begin(tmp_path, "a")
    do_steps(work, time, 1, 3)
    totals = summarize_ledger(tmp_path).checkpoint_totals()
    do_steps(work, time, 4, 5)
    work.close()
    work = begin(tmp_path, "b")
    carry_checkpoint_totals(work, tmp_path, json.loads(json.dumps(totals)))
    work.record_resume(3)
    assert summarize_ledger(tmp_path).inherited_ms == 0
    assert summarize_ledger(tmp_path).tokens_retained == 3000


def test_a_checkpoint_copied_without_its_ledger_brings_its_cost(tmp_path: Path, time: Time) -> None:
    first, second, third = tmp_path / "first", tmp_path / "second", tmp_path / "third"
    work = begin(first, "a")
    do_steps(work, time, 1, 3)
    totals = summarize_ledger(first).checkpoint_totals()
    for attempt in ("b", "c"):  # the second attempt in `second` crashed before any step: it inherits once
        work = begin(second, attempt)
        carry_checkpoint_totals(work, second, totals)
        work.record_resume(3)
        work.close()
    work = begin(second, "d")
    do_steps(work, time, 4, 5)
    summary = summarize_ledger(second)
    assert (summary.inherited_ms, summary.allocated_ms, summary.total_ms) == (RANKS * 300, RANKS * 200, RANKS * 500)
    assert (summary.tokens_retained, summary.tokens_consumed) == (5000, 5000)
    assert summary.allocated_ms == everything(summary)
    carry_checkpoint_totals(begin(third, "e"), third, summary.checkpoint_totals())
    assert summarize_ledger(third).inherited_ms == RANKS * 500


def test_a_ledger_of_another_run_or_one_behind_is_refused(tmp_path: Path, time: Time) -> None:
    work = begin(tmp_path / "first", "a")
    do_steps(work, time, 1, 3)
    totals = summarize_ledger(tmp_path / "first").checkpoint_totals()
    other = begin(tmp_path / "second", "b")
    do_steps(other, time, 1, 1)
    with pytest.raises(ConfigError, match="new run directory"):
        carry_checkpoint_totals(other, tmp_path / "second", totals)
    with pytest.raises(ConfigError, match="restore"):
        carry_checkpoint_totals(work, tmp_path / "first", {**totals, "gpu_ms": 10**9})
