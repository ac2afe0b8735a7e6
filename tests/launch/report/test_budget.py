"""The cost of a run adds up, in the budget section of a report and as JSON, and a broken ledger is named."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.launch.answers.blocks import Answer
from shoestring.launch.answers.terminal import terminal_text
from shoestring.launch.report.budget import cost_as_dict, cost_blocks, cost_cards
from shoestring.tests.launch.renderings import check_renderings
from shoestring.tests.launch.report.reader import Reader
from shoestring.tests.launch.report.recorded import LAST, record_run, report_of
from shoestring.tests.trainer.ledger.small_ledger import RANKS, Time, begin, do_steps
from shoestring.trainer.ledger.summary import LedgerSummary, summarize_ledger


def test_the_budget_adds_up(run_dir: Path, page: Reader) -> None:
    words = page.words("budget")
    summary = summarize_ledger(run_dir)
    hours = {name: gpu_ms / 3.6e6 for name, gpu_ms in summary.gpu_ms_by_bucket.items()}
    hours |= {"productive": summary.productive_ms / 3.6e6, "rolled back": summary.rolled_back_ms / 3.6e6}
    for name in ("productive", "rolled back", "evaluation"):
        assert hours[name] > 0
        assert f"{name} {hours[name]:.4f} {100 * hours[name] / 2:.1f} %" in words
    assert "allocated 2.0000 total of 2 attempts, the last closed" in words
    assert "all-to-all not overlapped 0.1440 10.0 %" in words
    assert "left 2.0000" in words
    assert "per trillion retained tokens 250,000,000 180,000 1,389 times" in words


def test_the_printed_and_the_json_form_agree(tmp_path: Path, time: Time) -> None:
    work = begin(tmp_path, "a")
    do_steps(work, time, 1, 36, milliseconds=1000)
    work.close()
    summary = summarize_ledger(tmp_path)
    data = json.loads(json.dumps(cost_as_dict(summary)))
    assert data["gpu_ms"]["allocated"] == RANKS * 36_000
    spent = data["gpu_ms"]
    assert spent["allocated"] == sum(spent.values()) - spent["allocated"] - spent["inherited"]
    assert sum(data["shares"].values()) == pytest.approx(1)
    assert data["gpu_hours"] == pytest.approx(0.04)
    assert data["published_phase_share"] == pytest.approx(0.04 / 2_664_000)
    answer = Answer.from_blocks("cost", data, list(cost_blocks(summary)), list(cost_cards(summary)))
    check_renderings(answer, smallest_number_of_quantities=8)
    shown = terminal_text(answer, width=120)
    for words in ("One rank is one GPU, also on CPU.", "8.0 %", "1,111,111", "180,000", "GPU-hours: 0.0400"):
        assert words in shown
    assert "total of 1 attempt, 3 segments, the last closed" in words_of(replace(summary, segments=3))


def words_of(summary: LedgerSummary) -> str:
    return terminal_text(Answer.from_blocks("cost", {}, list(cost_blocks(summary))), width=120)


def test_the_cost_of_an_initial_checkpoint_is_a_line_of_its_own(tmp_path: Path, time: Time) -> None:
    begin(tmp_path, "a")
    inherited = replace(summarize_ledger(tmp_path), inherited_ms=7_200_000)
    assert "cost of the checkpoint that it started from" in words_of(inherited)
    assert "allocated plus inherited" in words_of(inherited)
    assert cost_as_dict(inherited)["published"][1]["gpu_hours"] == 2


def test_a_run_without_a_step_or_a_ledger_says_so(tmp_path: Path, time: Time) -> None:
    with pytest.raises(ConfigError, match="no ledger"):
        summarize_ledger(tmp_path)
    begin(tmp_path, "a")
    summary = summarize_ledger(tmp_path)
    assert summary.gpu_hours_per_trillion_tokens is None
    shown = words_of(summary)
    assert "Phase: pre-training" in shown
    assert "total of 1 attempt, the last running as of its last heartbeat" in shown
    assert "No step time breakdown: no step was sampled." in shown


def test_a_broken_ledger_is_reported_in_its_place(tmp_path: Path) -> None:
    record_run(tmp_path)
    work = tmp_path / "ledger" / "work.jsonl"
    work.write_text(work.read_text().replace('"tokens":1000', '"tokens":9000', 1))
    page = report_of(tmp_path)
    assert "chain of hashes is broken" in page.words("budget")
    assert f"training {LAST:.3f}" in page.words("loss")
