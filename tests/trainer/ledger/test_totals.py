"""A checkpoint goes on with its own ledger, or brings its cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.tests.trainer.ledger.small_ledger import RANKS, Time, begin, do_steps, everything
from shoestring.trainer.ledger.summary import summarize
from shoestring.trainer.ledger.totals import carry


def test_a_checkpoint_with_its_ledger_goes_on(tmp_path: Path, time: Time) -> None:
    work = begin(tmp_path, "a")
    do_steps(work, time, 1, 3)
    totals = summarize(tmp_path).totals()
    do_steps(work, time, 4, 5)
    work.close()
    work = begin(tmp_path, "b")
    carry(work, tmp_path, json.loads(json.dumps(totals)))
    work.resume(3)
    assert summarize(tmp_path).inherited_ms == 0
    assert summarize(tmp_path).tokens_retained == 3000


def test_a_checkpoint_copied_without_its_ledger_brings_its_cost(tmp_path: Path, time: Time) -> None:
    first, second, third = tmp_path / "first", tmp_path / "second", tmp_path / "third"
    work = begin(first, "a")
    do_steps(work, time, 1, 3)
    totals = summarize(first).totals()
    for attempt in ("b", "c"):  # the second life in `second` crashed before any step: it inherits once
        work = begin(second, attempt)
        carry(work, second, totals)
        work.resume(3)
        work.close()
    work = begin(second, "d")
    do_steps(work, time, 4, 5)
    summary = summarize(second)
    assert (summary.inherited_ms, summary.allocated_ms, summary.total_ms) == (RANKS * 300, RANKS * 200, RANKS * 500)
    assert (summary.tokens_retained, summary.tokens_consumed) == (5000, 5000)
    assert summary.allocated_ms == everything(summary)
    carry(begin(third, "e"), third, summary.totals())
    assert summarize(third).inherited_ms == RANKS * 500


def test_a_ledger_of_another_run_or_one_behind_is_refused(tmp_path: Path, time: Time) -> None:
    work = begin(tmp_path / "first", "a")
    do_steps(work, time, 1, 3)
    totals = summarize(tmp_path / "first").totals()
    other = begin(tmp_path / "second", "b")
    do_steps(other, time, 1, 1)
    with pytest.raises(ConfigError, match="new run directory"):
        carry(other, tmp_path / "second", totals)
    with pytest.raises(ConfigError, match="restore"):
        carry(work, tmp_path / "first", {**totals, "gpu_ms": 10**9})
