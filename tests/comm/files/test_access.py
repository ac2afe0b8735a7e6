"""Files opened without waiting, read within a bound, and replaced as a whole."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.comm.files.access import (
    MAX_BYTES,
    chunks_of_lines,
    lines_within,
    open_regular,
    read_json,
    read_regular,
    refuse_links,
    refusing,
    replace_file,
)
from shoestring.comm.files.strict_json import Malformed


def other_kinds(root: Path) -> dict[str, Path]:
    """A path of each kind that is no regular file."""
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
        with pytest.raises(Malformed, match=f"is {kind}, not a regular file"):
            open_regular(path)
    for link in ("to_fifo", "to_device"):
        with pytest.raises(Malformed, match="not a regular file"):
            read_regular(tmp_path / link)
    (tmp_path / "real").write_text("{}")
    (tmp_path / "link").symlink_to("real")
    assert read_json(tmp_path / "link").value == {}
    with pytest.raises(Malformed, match="too large: at most 1 bytes"):
        read_regular(tmp_path / "real", 1)
    os.truncate(tmp_path / "real", MAX_BYTES + 1)  # sparse
    with pytest.raises(Malformed, match="too large"):
        read_regular(tmp_path / "real")


def test_a_refusal_names_the_file(tmp_path: Path) -> None:
    said = r"absent = None: cannot be used: No such file or directory; fetch it"
    with pytest.raises(ConfigError, match=said), refusing(tmp_path / "absent", "fetch it"):
        read_json(tmp_path / "absent")
    (tmp_path / "bad").write_text('{"a": "b"}')
    said = r"bad: a = 'b': must be a whole number; fetch it"
    with pytest.raises(ConfigError, match=said), refusing(tmp_path / "bad", "fetch it"):
        read_json(tmp_path / "bad")["a"].whole()


def test_a_file_is_replaced_as_a_whole_and_through_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere, path = tmp_path / "elsewhere", tmp_path / "state.json"
    elsewhere.write_text("mine")
    path.symlink_to(elsewhere)
    (tmp_path / "state.json.new").symlink_to(elsewhere)
    replace_file(path, b"one")
    assert (path.read_text(), elsewhere.read_text()) == ("one", "mine")
    assert not path.is_symlink()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, b"two")
    assert path.read_text() == "one"
    assert {each.name for each in tmp_path.iterdir()} == {"elsewhere", "state.json"}


def test_what_would_be_appended_to_must_be_a_file_of_its_own(tmp_path: Path) -> None:
    refuse_links(tmp_path / "absent")
    (tmp_path / "own").touch()
    refuse_links(tmp_path / "own")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "fifo")
    for name, kind in (("link", "a link"), ("fifo", "a FIFO")):
        with pytest.raises(ConfigError, match=f"{name} = '{kind}'"):
            refuse_links(tmp_path / name)


def test_lines_have_a_bound(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"123\n" * 5 + b"12")
    with open_regular(path) as file:
        assert list(lines_within(file, 4)) == [b"123\n"] * 5 + [b"12"]
    with open_regular(path) as file, pytest.raises(Malformed, match="more than 3 bytes"):
        list(lines_within(file, 3))
    with open_regular(path) as file:
        assert b"".join(chunks_of_lines(file)) == path.read_bytes()
    os.truncate(path, 2**40)
    for read in (lines_within, chunks_of_lines):
        with open_regular(path) as file, pytest.raises(Malformed, match="more than 8388608 bytes"):
            list(read(file))
