"""The budget section of a report adds up, and names a broken ledger."""

from __future__ import annotations

from pathlib import Path

from shoestring.tests.launch.report.reader import Reader
from shoestring.tests.launch.report.recorded import LAST, record_run, report_of
from shoestring.trainer.ledger.summary import summarize_ledger


def test_the_budget_adds_up(run_dir: Path, page: Reader) -> None:
    words = page.words("budget")
    summary = summarize_ledger(run_dir)
    hours = {name: gpu_ms / 3.6e6 for name, gpu_ms in summary.gpu_ms_by_bucket.items()}
    hours |= {"productive": summary.productive_ms / 3.6e6, "rolled back": summary.rolled_back_ms / 3.6e6}
    for name in ("productive", "rolled back", "evaluation"):
        assert hours[name] > 0
        assert f"{name} {hours[name]:.4f} {100 * hours[name] / 2:.1f} %" in words
    assert "allocated 2.0000 100 % total of 2 attempts" in words
    assert "all-to-all not overlapped 0.1440 10.0 %" in words
    assert "left 2.0000" in words
    assert "per trillion tokens 250,000,000 180,000 1,389 times" in words


def test_a_broken_ledger_is_reported_in_its_place(tmp_path: Path) -> None:
    record_run(tmp_path)
    work = tmp_path / "ledger" / "work.jsonl"
    work.write_text(work.read_text().replace('"tokens":1000', '"tokens":9000', 1))
    page = report_of(tmp_path)
    assert "chain of hashes is broken" in page.words("budget")
    assert f"training {LAST:.3f}" in page.words("loss")
