"""The meter of a run gives the totals of its ledger."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoestring.tests.trainer.ledger.small_ledger import RANKS, Time, begin, launch
from shoestring.trainer.ledger.meter import CostMeter
from shoestring.trainer.ledger.summary import summarize_ledger


def test_the_meter_reads_what_the_ledger_will(tmp_path: Path, time: Time) -> None:
    allocation = launch(tmp_path, "a")
    time.pass_ms(1000)
    work = begin(tmp_path, "a")
    meter = CostMeter(summarize_ledger(tmp_path), ranks=RANKS)
    for step in range(1, 6):
        time.pass_ms(100)
        meter.add_step(work.record_step(step, 100, tokens=1000))
    work.close()
    allocation.close("done")
    summary = summarize_ledger(tmp_path)
    assert meter.gpu_hours() == meter.phase_gpu_hours() == pytest.approx(summary.gpu_hours)
    assert meter.goodput() == pytest.approx(summary.goodput) == pytest.approx(1 / 3)
