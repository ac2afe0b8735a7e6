"""The budget as tables and as JSON."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from shoestring.comm.errors import ConfigError
from shoestring.tests.trainer.ledger.small_ledger import RANKS, Time, begin, do_steps
from shoestring.trainer.ledger.render import render_ledger
from shoestring.trainer.ledger.summary import summarize_ledger


def test_the_printed_and_the_json_form_agree(tmp_path: Path, time: Time) -> None:
    work = begin(tmp_path, "a")
    do_steps(work, time, 1, 36, milliseconds=1000)
    work.close()
    summary = summarize_ledger(tmp_path)
    data = json.loads(json.dumps(summary.to_json()))
    assert data["gpu_ms"]["allocated"] == RANKS * 36_000
    spent = data["gpu_ms"]
    assert spent["allocated"] == sum(spent.values()) - spent["allocated"] - spent["inherited"]
    assert data["gpu_hours"] == pytest.approx(0.04)
    assert data["published_phase_share"] == pytest.approx(0.04 / 2_664_000)
    text = io.StringIO()
    Console(file=text, width=120).print(render_ledger(summary))
    shown = text.getvalue()
    assert "One rank is one GPU, also on CPU." in shown
    assert "8.0 %" in shown
    assert "1,111,111" in shown
    assert "180,000" in shown
    assert "0.0400 GPU-hours" in shown


def test_a_run_without_a_step_or_a_ledger_says_so(tmp_path: Path, time: Time) -> None:
    with pytest.raises(ConfigError, match="no ledger"):
        summarize_ledger(tmp_path)
    begin(tmp_path, "a")
    summary = summarize_ledger(tmp_path)
    assert summary.gpu_hours_per_trillion_tokens is None
    text = io.StringIO()
    Console(file=text, width=120).print(render_ledger(summary))
    assert "pre_train: 1 attempt, the last running" in text.getvalue()
