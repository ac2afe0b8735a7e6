"""Notes that keep a run from restarting without end."""

import os
from collections.abc import Callable
from pathlib import Path

from shoestring.launch.run import restart_policy as stops
from shoestring.launch.run.restart_policy import (
    MAX_STOPS_WITHOUT_STEP,
    attempt_exit_code,
    count_stops_without_step,
    record_stop,
    restart_blocker,
)
from shoestring.trainer.run.evaluate import read_evaluated_step


def test_stops_without_a_step_are_counted_until_one_is_made(tmp_path: Path) -> None:
    assert restart_blocker(tmp_path) is None
    for count in range(1, MAX_STOPS_WITHOUT_STEP):
        record_stop(tmp_path, made_step=False)
        assert (count_stops_without_step(tmp_path), restart_blocker(tmp_path)) == (count, None)
    record_stop(tmp_path, made_step=False)
    assert "3 attempts in a row were stopped before their first step" in str(restart_blocker(tmp_path))
    record_stop(tmp_path, made_step=True)
    assert restart_blocker(tmp_path) is None
    for junk in ("", "x", "-1", "9" * 50, "\0"):
        (tmp_path / stops._FILE).write_text(junk)
        assert count_stops_without_step(tmp_path) == 0


def test_notes_of_a_run_that_are_no_files_say_nothing(tmp_path: Path) -> None:
    names: dict[str, Callable[[Path], int | None]] = {
        stops._FILE: count_stops_without_step,
        "evaluated": read_evaluated_step,
    }
    names[stops._ENDED] = lambda run: attempt_exit_code(run, "a")
    harms: list[Callable[[Path], object]] = [os.mkfifo, Path.mkdir, lambda path: path.write_bytes(b"\xff"), endless]
    for harm in harms:
        for name, read in names.items():
            harm(tmp_path / name)
            assert not read(tmp_path), name
            (tmp_path / name).rmdir() if (tmp_path / name).is_dir() else (tmp_path / name).unlink()


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")
