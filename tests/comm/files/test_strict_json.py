"""Whatever a file of others may hold is read as it is or named as what it is."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shoestring.comm.errors import ConfigError, Problem
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
from shoestring.comm.files.strict_json import LARGEST, MAX_DEPTH, Item, Malformed, parse_json
from shoestring.comm.files.strict_yaml import read_yaml


@pytest.mark.parametrize(
    ("raw", "gist"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"{} {}", "is not JSON"),
        (b"\xff{}", "byte 0.*is not UTF-8|is not UTF-8"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        (b'{"a": [1e999]}', "larger than any finite number .*1e999"),
        (b'{"a": -1e999}', "larger than any finite number"),
        ('{"a": 1}'.encode("utf-16"), "is not UTF-8"),
        (b'{"a": NaN}', "no number is NaN or infinite"),
        (b'{"a": [-Infinity]}', "no number is NaN or infinite"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "c = 2: stands there twice"),
        (b"[" * 100_000, "nested more than 64 deep"),
        (b"[" * 100_000 + b"]" * 100_000, "nested more than 64 deep"),
        (b'{"a":' * 70 + b"1" + b"}" * 70, "nested more than 64 deep"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b"{'a': 1}", "is not JSON"),
        (b'{"a": 01}', "is not JSON"),
        (b'{"a": "\n"}', "is not JSON"),
    ],
)
def test_what_is_no_strict_json_is_named(raw: bytes, gist: str) -> None:
    with pytest.raises(Malformed, match=gist):
        parse_json(raw)


def test_what_is_json_is_read() -> None:
    deepest = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    parse_json(deepest)
    many = b"[" + b",".join([b"[]"] * 1000) + b"]"  # wide is not deep
    assert len(parse_json(many).list()) == 1000
    assert parse_json('{"é": "\\ud83d\\ude00"}')["é"].text() == "\U0001f600"


WRONG: list[tuple[Callable[[Item], object], list[Any]]] = [
    (Item.whole, [1.0, 1.5, True, "1", None, [], {}, -1, LARGEST + 1, 10**40]),
    (Item.number, [True, "1", None, [], float("inf"), float("nan"), 10**400]),
    (Item.text, [1, None, True, ["a"]]),
    (Item.flag, [0, 1, "true", None]),
    (Item.list, ["ab", {}, None, 3]),
    (Item.mapping, ["ab", [], None, 3]),
    (Item.inside, ["", "/etc/passwd", "../a", "a/../../b", ".", "a\0b", "..\\a", 5, None]),
    (Item.file_name, ["a/b", "", "..", "/dev/zero", "x" * 256, "é" * 200]),
    (Item.sha256, ["", "a" * 63, "A" * 64, "g" * 64, 5, "a" * 65]),
]


@pytest.mark.parametrize(("ask", "values"), WRONG, ids=[ask.__name__ for ask, _ in WRONG])
def test_a_value_of_another_type_or_range_is_named_with_its_place(
    ask: Callable[[Item], object], values: list[Any]
) -> None:
    for value in values:
        with pytest.raises(Malformed) as caught:
            ask(Item({"a": [value]})["a"].list()[0])
        assert caught.value.where == "a[0]"
        assert len(str(caught.value)) < 400


def test_ranges_and_missing_keys() -> None:
    item = parse_json('{"a": {"n": 7}}')
    assert item["a"]["n"].whole(7, 7) == 7
    with pytest.raises(Malformed, match=r"a\.n = 7: must be from 8 to 9"):
        item["a"]["n"].whole(8, 9)
    with pytest.raises(Malformed, match=r"a\.n = 7: must be from 0 to 1"):
        item["a"]["n"].number(0, 1)
    with pytest.raises(Malformed, match=r"a\.m = None: is missing"):
        item["a"]["m"]
    with pytest.raises(Malformed, match=r"a = .*: is no key of this format"):
        item.only(["b"])
    assert item["a"].get("m") is None


@dataclass(frozen=True)
class Inner:
    sizes: tuple[int, ...]
    name: str = "x"


@dataclass(frozen=True)
class Outer:
    inner: Inner
    rate: float
    rank: int | None
    on: bool


def test_a_dataclass_is_built_by_the_types_of_its_fields() -> None:
    text = '{"inner": {"sizes": [1, 2]}, "rate": 1, "rank": null, "on": true}'
    assert parse_json(text).build(Outer) == Outer(Inner((1, 2)), 1.0, None, True)
    for old, new, gist in (
        ("[1, 2]", "[1, 2.0]", r"inner\.sizes\[1\] = 2\.0: must be a whole number"),
        ("[1, 2]", "5", r"inner\.sizes = 5: must be a list"),
        ("null", "true", "rank = True: must be a whole number"),
        ('"on": true', '"on": 1', "on = 1: must be true or false"),
        ('"rate": 1, ', "", "rate = None: is missing"),
        ('"on"', '"off"', "off = True: is no key of this format"),
    ):
        with pytest.raises(Malformed, match=gist):
            parse_json(text.replace(old, new)).build(Outer)


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


@pytest.mark.parametrize(
    ("text", "gist"),
    [
        ("a: [1", "is not YAML"),
        ("a: &a [*a]", "alias for what it stands in"),
        ("a: &a {b: *a}", "alias for what it stands in"),
        ("\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
                   + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]), "every alias"),
        ("[" * 5000, "nested more than 64 deep"),
        ("a: " + "[" * 80 + "]" * 80, "nested more than 64 deep"),
        ("a: \x00", "is not YAML"),
        ("a: 1\nb:\n  c: 1\n  c: 2", "line 4 = 'c': is a key that stands there twice"),
        ("a: ${b}\nb: ${a}", "is not YAML of a configuration|refers to itself"),
        ("a: ${nowhere}", "is not YAML of a configuration"),
        ("a: !!python/object:os.system {}", "is not YAML"),
        ("5", "is not YAML of a configuration"),
    ],
)  # fmt: skip
def test_yaml_that_explodes_or_is_none_is_named(text: str, gist: str, tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text(text)
    with pytest.raises(Malformed, match=gist):
        read_yaml(tmp_path / "file.yaml")


def test_yaml_with_an_honest_alias_is_read(tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text("a: &a [1, 2]\nb: *a\nc: ${a}\n")
    assert read_yaml(tmp_path / "file.yaml") == {"a": [1, 2], "b": [1, 2], "c": [1, 2]}
    (tmp_path / "file.yaml").write_bytes(b"a: \xff")
    with pytest.raises(Malformed, match="UTF-8"):
        read_yaml(tmp_path / "file.yaml")
    (tmp_path / "file.yaml").write_text("a: 1\nb: ${a}\n")
    assert read_yaml(tmp_path / "file.yaml", resolve=False) == {"a": 1, "b": "${a}"}


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


def test_a_problem_sends_nothing_to_the_terminal() -> None:
    """Not by its field, its value or its remedy; a line break of a message of ours stays, one in a name does not."""
    said = str(Problem("a\x1b[31m\n\x07\u202e", "\x1b\x07", "holds \x1b]0;\x9b;\nwrite it again"))
    assert said == r"a\x1b[31m\n\x07\u202e = '\x1b\x07': holds \x1b]0;\x9b;" + "\nwrite it again"
    assert str(Malformed("\x1b[2J", 1, "must be \x07")) == r"\x1b[2J = 1: must be \x07"
    assert str(Problem("é 語", 1, "stays")) == "é 語 = 1: stays"
