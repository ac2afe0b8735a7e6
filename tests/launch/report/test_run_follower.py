"""A run is followed from before its first step, and reread when it starts again."""

import shutil
from pathlib import Path

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.launch.report.run_follower import RunFollower
from shoestring.launch.run.run_dir import create_run_dir
from shoestring.tests.launch.report.followed import append, shown
from shoestring.tests.launch.report.recorded import events, record_run, step
from shoestring.tests.trainer.telemetry.written_events import RUN_OF_FORMAT_1
from shoestring.trainer.telemetry.downsample import open_tail_reader


def test_a_run_is_followed_from_before_its_first_step(tmp_path: Path) -> None:
    create_run_dir(tmp_path)
    follower = RunFollower(tmp_path)
    assert "none yet" in shown(follower)
    assert "no readable ledger" in shown(follower)
    run, *_ = events(tmp_path)
    append(tmp_path, run)
    assert "0 of 8" in shown(follower)
    assert "starting up" in shown(follower)
    append(tmp_path, step(1, loss=7.5))
    assert "1 of 8" in shown(follower)
    assert "7.500" in shown(follower)
    assert "1.5000 projected" not in shown(follower)  # the ledger has the projection
    assert "training" in shown(follower)


def test_half_a_line_waits_for_its_end(tmp_path: Path) -> None:
    create_run_dir(tmp_path)
    line = step(1, loss=7.5).to_json_line() + "\n"
    (tmp_path / "metrics.jsonl").write_text(line[:40])
    follower = RunFollower(tmp_path)
    assert "none yet" in shown(follower)
    (tmp_path / "metrics.jsonl").open("a").write(line[40:])
    assert "7.500" in shown(follower)


def test_the_format_is_read_even_if_a_run_is_followed_from_its_last_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_run_dir(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(RUN_OF_FORMAT_1)
    append(tmp_path, *(step(number, loss=7.5) for number in range(1, 9)))
    monkeypatch.setattr(open_tail_reader, "__defaults__", (1000,))
    with pytest.raises(ConfigError, match=r"metrics\.jsonl:1: format = 1: .* reads metrics format 2"):
        RunFollower(tmp_path)


def test_a_run_that_begins_anew_is_read_anew(tmp_path: Path) -> None:
    record_run(tmp_path)
    follower = RunFollower(tmp_path)
    assert "8 of 8" in shown(follower)
    (tmp_path / "metrics.jsonl").unlink()
    shutil.rmtree(tmp_path / "ledger")
    assert "none yet" in shown(follower)
    append(tmp_path, step(1, loss=7.5))
    assert "1 of 8" in shown(follower)
    assert "resume" not in shown(follower)
