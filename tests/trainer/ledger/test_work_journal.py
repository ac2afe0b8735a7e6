"""Rank 0's half of the ledger: intervals, timed blocks, and errors of the caller."""

from pathlib import Path

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.tests.trainer.ledger.small_ledger import RANKS, Time, begin, do_steps, launch
from shoestring.trainer.ledger.summary import summarize_ledger


def test_overlapping_intervals_are_refused(tmp_path: Path, time: Time) -> None:
    work = begin(tmp_path, "a")
    do_steps(work, time, 1, 1)
    work.record_interval("evaluation", 50)
    work.close()
    with pytest.raises(ConfigError, match="overlap"):
        summarize_ledger(tmp_path)


def test_what_a_timed_block_took_is_charged_also_when_it_fails(tmp_path: Path, time: Time) -> None:
    work = begin(tmp_path, "a")

    def save() -> None:
        with work.charge_time("checkpoint_save"):
            time.pass_ms(5)
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save()
    work.close()
    assert summarize_ledger(tmp_path).gpu_ms_by_bucket["checkpoint_save"] == RANKS * 5


def test_what_is_cut_from_short_steps_is_not_lost(tmp_path: Path, time: Time) -> None:
    work = begin(tmp_path, "a")
    do_steps(work, time, 1, 1000, milliseconds=0.75)
    work.close()
    assert summarize_ledger(tmp_path).productive_ms == RANKS * 750


def test_mistakes_of_the_caller_are_errors(tmp_path: Path, time: Time) -> None:
    work = begin(tmp_path, "a")
    with pytest.raises(ValueError, match="not a bucket"):
        work.record_interval("lunch", 5)
    with pytest.raises(ValueError, match="cannot last"):
        work.record_interval("evaluation", -1)
    launch(tmp_path, "a").close("done")
    with pytest.raises(ValueError, match="needs another name"):
        launch(tmp_path, "a")
