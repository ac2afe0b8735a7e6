"""The directory of a run: its owner, its status, links in place of its files, and notes against endless restarts."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.launch.run import run_dir as run_directory
from shoestring.launch.run.run_dir import (
    CONFIG_FILE,
    MAX_STOPS_WITHOUT_STEP,
    attempt_exit_code,
    count_stops_without_step,
    create_run_dir,
    lock_run_dir,
    read_run_status,
    record_attempt_exit,
    record_stop,
    reserve_status_space,
    restart_blocker,
    run_dir_problems,
    wait_for_run_dir_lock,
    write_run_config,
    write_run_status,
)
from shoestring.tests.launch.small_checkpoint import dangling, device, fifo, folder
from shoestring.trainer.run.evaluate import read_evaluated_step


def test_a_directory_that_is_let_go_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wait_for_run_dir_lock(tmp_path / "none", 60)
    with lock_run_dir(tmp_path / "run", fresh=False):
        wait_for_run_dir_lock(tmp_path / "run", 0.1)
    assert "waiting up to 0.1 s for the previous launch" in capsys.readouterr().err
    wait_for_run_dir_lock(tmp_path / "run", 60)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "raw", [b"", b"{", b'{"exit_code": 0, "rea', b"[]", b"{}", b"\0" * 40, b"null",
            b'{"exit_code": "0", "reason": "done"}', b'{"exit_code": true, "reason": "done"}',
            b'{"exit_code": 0, "reason": 5}', b'{"exit_code": 700, "reason": ""}', b"\xff", b"[" * 99999]
)  # fmt: skip
def test_a_status_that_cannot_be_read_counts_as_absent_and_is_reported(
    raw: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run_status.json").write_bytes(raw)
    assert read_run_status(tmp_path) is None
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"shoestring train: {tmp_path / 'run_status.json'} cannot be read")
    write_run_status(tmp_path, 75, "stopped")
    assert read_run_status(tmp_path) == {"exit_code": 75, "reason": "stopped"}
    (tmp_path / "run_status.json").unlink()
    assert read_run_status(tmp_path) is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("harm", [fifo, folder, device, dangling])
def test_a_status_that_is_no_file_counts_as_absent(harm: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "run_status.json").touch()
    harm(tmp_path / "run_status.json")
    assert read_run_status(tmp_path) is None


def test_state_of_a_run_is_written_through_no_link(tmp_path: Path) -> None:
    from shoestring.trainer.ledger.allocation_journal import AllocationJournal
    from shoestring.trainer.ledger.config import BudgetConfig
    from shoestring.trainer.telemetry.stream import EventStream

    precious = tmp_path / "precious"
    precious.write_text("mine")
    run_dir = tmp_path / "run"
    create_run_dir(run_dir)
    (run_dir / "ledger").mkdir()
    for name in ("config.yaml", "run_status.json", "ledger/heartbeat.new", "ledger/heartbeat.json",
                 "ledger/heartbeat.json.new", "config.yaml.new", "ended", "stops_without_step",
                 "stops_without_step.new", "run_status.reserve"):  # fmt: skip
        (run_dir / name).symlink_to(precious)
    reserve_status_space(run_dir)
    record_stop(run_dir, made_step=False)
    record_attempt_exit(run_dir, "a", 0)
    write_run_config(run_dir, "a: 1\n")
    write_run_status(run_dir, 0, "done")
    AllocationJournal(run_dir, ranks=1, attempt="a", budget=BudgetConfig(gpu_hours=1), heartbeat_seconds=1000).close(
        "done"
    )
    assert precious.read_text() == "mine"
    assert (run_dir / "config.yaml").read_text() == "a: 1\n"
    budget = BudgetConfig(gpu_hours=1)
    for name, make in (
        ("metrics.jsonl", lambda: EventStream(run_dir, [])),
        ("ledger/allocation.jsonl", lambda: AllocationJournal(run_dir, ranks=1, attempt="b", budget=budget)),
    ):
        (run_dir / name).unlink(missing_ok=True)
        (run_dir / name).symlink_to(precious)
        with pytest.raises(Exception, match=r"not through links"):
            make()
    assert precious.read_text() == "mine"


def test_a_fresh_run_removes_links_and_not_what_they_point_to(tmp_path: Path) -> None:
    elsewhere, run_dir = tmp_path / "big_disk", tmp_path / "run"
    elsewhere.mkdir()
    (elsewhere / "step_00000001").write_text("")
    with lock_run_dir(run_dir, fresh=False):
        (run_dir / "checkpoints").symlink_to(elsewhere)
        (run_dir / "metrics.jsonl").symlink_to(tmp_path / "nowhere")
        (run_dir / "ledger").mkdir()
    with lock_run_dir(run_dir, fresh=True):
        assert {path.name for path in run_dir.iterdir()} == {"lock", ".shoestring_run"}
    assert (elsewhere / "step_00000001").exists()


def test_a_reason_is_given_where_the_system_gives_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise OSError(f"no way to remove {path.name}")

    with lock_run_dir(tmp_path / "run", fresh=False):
        (tmp_path / "run" / "ledger").mkdir()
    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(ConfigError, match="no way to remove ledger"), lock_run_dir(tmp_path / "run", fresh=True):
        pass


def test_two_launchers_of_one_directory(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with lock_run_dir(run_dir, fresh=False):
        (run_dir / CONFIG_FILE).write_text("")
        with pytest.raises(ConfigError, match="another run is active"), lock_run_dir(run_dir, fresh=True):
            pass
        assert (run_dir / CONFIG_FILE).exists()
    with lock_run_dir(run_dir, fresh=True):
        assert not (run_dir / CONFIG_FILE).exists()


def test_a_directory_that_is_being_made_is_a_runs(tmp_path: Path) -> None:
    """Another machine of the launch may look between the unfinished marker and the finished one."""
    (tmp_path / ".shoestring_run.new").touch()
    assert not list(run_dir_problems(tmp_path))
    (tmp_path / "thesis.tex").touch()
    assert list(run_dir_problems(tmp_path))


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
        (tmp_path / run_directory._STOPS_FILE).write_text(junk)
        assert count_stops_without_step(tmp_path) == 0


def test_notes_of_a_run_that_are_no_files_say_nothing(tmp_path: Path) -> None:
    names: dict[str, Callable[[Path], int | None]] = {
        run_directory._STOPS_FILE: count_stops_without_step,
        "evaluated": read_evaluated_step,
    }
    names[run_directory._ENDED_FILE] = lambda run: attempt_exit_code(run, "a")
    harms: list[Callable[[Path], object]] = [os.mkfifo, Path.mkdir, lambda path: path.write_bytes(b"\xff"), endless]
    for harm in harms:
        for name, read in names.items():
            harm(tmp_path / name)
            assert not read(tmp_path), name
            (tmp_path / name).rmdir() if (tmp_path / name).is_dir() else (tmp_path / name).unlink()


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")
