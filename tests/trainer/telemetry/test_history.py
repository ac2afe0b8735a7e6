"""Reading `metrics.jsonl` back: the history of the weights, and lines that are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from shoestring.tests.launch.report.recorded import record_run
from shoestring.tests.launch.small_checkpoint import fifo, folder, shoestring


def test_a_number_of_metrics_without_end_is_no_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(f'{{"kind": "step", "step": 9, "time": 1, "loss": {10**400}}}\n')
    assert shoestring(capsys, "report", tmp_path, "--out", tmp_path / "made")[0] == 0
    assert shoestring(capsys, "watch", tmp_path, "--once")[0] == 0


@pytest.mark.parametrize(
    ("harm", "gist"),
    [
        (lambda run: (run / "metrics.jsonl").write_text('{"kind": 5, "step": 1, "time": 1}\n'), "must be text"),
        (lambda run: (run / "metrics.jsonl").write_text('{"kind": "a", "step": 1.5, "time": 1}\n'), "a whole number"),
        (lambda run: (run / "metrics.jsonl").write_text('{"kind": "a", "step": 1, "time": 1e99}\n'), "time = 1e+99"),
        (lambda run: (run / "metrics.jsonl").write_text('{"kind": "a", "step": 1, "time": NaN}\n'), "NaN"),
        (lambda run: (run / "metrics.jsonl").write_bytes(b'{"kind": "\xff", "step": 1, "time": 1}\n'), "UTF-8"),
        (lambda run: (run / "metrics.jsonl").write_text("[" * 99999 + "\n"), "nested"),
        (lambda run: folder(run / "metrics.jsonl"), "is a folder"),
        (lambda run: fifo(run / "metrics.jsonl"), "is a FIFO"),
    ],
)
def test_metrics_of_wrong_values_are_refused_by_line(
    harm: Callable[[Path], object], gist: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    record_run(run_dir)
    harm(run_dir)
    for verb in (["report", run_dir], ["watch", run_dir, "--once"]):
        code, _, errors = shoestring(capsys, *verb)
        assert code == 2, errors
        assert "metrics.jsonl" in errors
        assert gist in errors
