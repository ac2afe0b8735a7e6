"""Directories that are being written, by a process that runs, has died, or cannot be known."""

from pathlib import Path

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.trainer.data.unfinished_directory import (
    WriterLiveness,
    check_writer_liveness,
    lock_directory,
    remove_lock,
    remove_unfinished_directories,
    unfinished_directory,
)


def leave(directory: Path) -> Path:
    """Leave what a killed process leaves: the lock file, which no process holds."""
    directory.mkdir(parents=True)
    with lock_directory(directory):
        (directory / "half").write_bytes(b"x")
    return directory


def test_only_what_a_dead_process_has_left_is_removed(tmp_path: Path) -> None:
    dead = leave(tmp_path / ".made.making-1-ab")
    (unknown := tmp_path / ".made.making-2-cd").mkdir()
    (other := tmp_path / ".made.preparing-3-ef").mkdir()
    lines: list[str] = []
    with unfinished_directory(tmp_path / "made", "making", "directory") as living:
        assert [check_writer_liveness(each) for each in (dead, unknown, living)] == [
            WriterLiveness.DEAD,
            WriterLiveness.UNKNOWN,
            WriterLiveness.ALIVE,
        ]
        remove_unfinished_directories(tmp_path / "made", "making", lines.append)
        assert {*tmp_path.iterdir()} == {unknown, other, living}
    assert {*tmp_path.iterdir()} == {unknown, other}
    assert f"{dead} was left by a process that was killed; it is removed." in lines
    assert f"{living} is being written by another process." in lines
    assert f"{unknown} was left by another process. If none is running, delete it." in lines


def test_what_is_renamed_stays_without_its_lock(tmp_path: Path) -> None:
    with unfinished_directory(tmp_path / "made", "making", "directory") as directory:
        (directory / "whole").touch()
        remove_lock(directory)
        directory.rename(tmp_path / "made")
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["whole"]


def test_a_place_that_takes_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match="cannot be created: Not a directory"),
        unfinished_directory(tmp_path / "file/x", "a", "b"),
    ):
        pass
