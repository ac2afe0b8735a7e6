"""Files opened without blocking, read up to a limit, and replaced atomically."""

import os
import socket
from pathlib import Path

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.comm.files.file_io import (
    MAX_FILE_BYTES,
    config_error_context,
    open_regular_file,
    raise_if_not_regular_file,
    read_bounded_lines,
    read_json,
    read_line_blocks,
    read_regular_file,
    replace_file_atomically,
)
from shoestring.comm.files.strict_json import MalformedFileError


def other_kinds(root: Path) -> dict[str, Path]:
    """Return one path of each kind that is not a regular file."""
    (root / "folder").mkdir()
    os.mkfifo(root / "fifo")
    (root / "to_fifo").symlink_to(root / "fifo")
    held = socket.socket(socket.AF_UNIX)
    held.bind(str(root / "socket"))
    held.close()
    (root / "to_device").symlink_to("/dev/zero")
    return {
        "a folder": root / "folder",
        "a FIFO": root / "fifo",
        "a socket": root / "socket",
        "a device": Path("/dev/zero"),
    }


def test_only_regular_files_are_opened_and_nothing_is_waited_for(tmp_path: Path) -> None:
    for kind, path in other_kinds(tmp_path).items():
        with pytest.raises(MalformedFileError, match=f"is {kind}, not a regular file"):
            open_regular_file(path)
    for link in ("to_fifo", "to_device"):
        with pytest.raises(MalformedFileError, match="not a regular file"):
            read_regular_file(tmp_path / link)
    (tmp_path / "real").write_text("{}")
    (tmp_path / "link").symlink_to("real")
    assert read_json(tmp_path / "link").value == {}
    with pytest.raises(MalformedFileError, match="too large: at most 1 bytes"):
        read_regular_file(tmp_path / "real", 1)
    os.truncate(tmp_path / "real", MAX_FILE_BYTES + 1)  # sparse
    with pytest.raises(MalformedFileError, match="too large"):
        read_regular_file(tmp_path / "real")


def test_a_refusal_names_the_file(tmp_path: Path) -> None:
    said = r"absent = None: cannot be used: No such file or directory; fetch it"
    with pytest.raises(ConfigError, match=said), config_error_context(tmp_path / "absent", "fetch it"):
        read_json(tmp_path / "absent")
    (tmp_path / "bad").write_text('{"a": "b"}')
    said = r"bad: a = 'b': must be a whole number; fetch it"
    with pytest.raises(ConfigError, match=said), config_error_context(tmp_path / "bad", "fetch it"):
        read_json(tmp_path / "bad")["a"].as_integer()


def test_a_file_is_replaced_as_a_whole_and_through_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere, path = tmp_path / "elsewhere", tmp_path / "state.json"
    elsewhere.write_text("mine")
    path.symlink_to(elsewhere)
    (tmp_path / "state.json.new").symlink_to(elsewhere)
    replace_file_atomically(path, b"one")
    assert (path.read_text(), elsewhere.read_text()) == ("one", "mine")
    assert not path.is_symlink()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_file_atomically(path, b"two")
    assert path.read_text() == "one"
    assert {each.name for each in tmp_path.iterdir()} == {"elsewhere", "state.json"}


def test_what_would_be_appended_to_must_be_a_file_of_its_own(tmp_path: Path) -> None:
    raise_if_not_regular_file(tmp_path / "absent")
    (tmp_path / "own").touch()
    raise_if_not_regular_file(tmp_path / "own")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "fifo")
    for name, kind in (("link", "a link"), ("fifo", "a FIFO")):
        with pytest.raises(ConfigError, match=f"{name} = '{kind}'"):
            raise_if_not_regular_file(tmp_path / name)


def test_lines_have_a_bound(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"123\n" * 5 + b"12")
    with open_regular_file(path) as file:
        assert list(read_bounded_lines(file, 4)) == [b"123\n"] * 5 + [b"12"]
    with open_regular_file(path) as file, pytest.raises(MalformedFileError, match="more than 3 bytes"):
        list(read_bounded_lines(file, 3))
    with open_regular_file(path) as file:
        assert b"".join(read_line_blocks(file)) == path.read_bytes()
    os.truncate(path, 2**40)
    for read in (read_bounded_lines, read_line_blocks):
        with open_regular_file(path) as file, pytest.raises(MalformedFileError, match="more than 8388608 bytes"):
            list(read(file))
