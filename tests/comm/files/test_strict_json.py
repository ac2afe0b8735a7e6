"""JSON from other programs: it is read unchanged, or the error names what is wrong."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import pytest

from shoestring.comm.files.ranges import FILE_NAME, RELATIVE_PATH, SHA256, between, one_of
from shoestring.comm.files.strict_json import (
    MAX_DEPTH,
    MAX_INTEGER,
    JsonValue,
    MalformedFileError,
    UnsupportedFormatError,
    parse_json,
)


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
        (b'{"a": NaN}', "numbers must be finite"),
        (b'{"a": [-Infinity]}', "numbers must be finite"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "c = 2: is a repeated key"),
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
    with pytest.raises(MalformedFileError, match=gist):
        parse_json(raw)


def test_what_is_json_is_read() -> None:
    deepest = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    parse_json(deepest)
    many = b"[" + b",".join([b"[]"] * 1000) + b"]"  # wide, not deep
    assert len(parse_json(many).as_list()) == 1000
    assert parse_json('{"é": "\\ud83d\\ude00"}')["é"].as_string() == "\U0001f600"


WRONG: list[tuple[Callable[[JsonValue], object], list[Any]]] = [
    (JsonValue.as_integer, [1.0, 1.5, True, "1", None, [], {}, -1, MAX_INTEGER + 1, 10**40]),
    (JsonValue.as_number, [True, "1", None, [], float("inf"), float("nan"), 10**400]),
    (JsonValue.as_string, [1, None, True, ["a"]]),
    (JsonValue.as_boolean, [0, 1, "true", None]),
    (JsonValue.as_list, ["ab", {}, None, 3]),
    (JsonValue.as_mapping, ["ab", [], None, 3]),
    (
        lambda item: item.as_text_in(RELATIVE_PATH),
        ["", "/etc/passwd", "../a", "a/../../b", ".", "a\0b", "..\\a", 5, None],
    ),
    (lambda item: item.as_text_in(FILE_NAME), ["a/b", "", "..", "/dev/zero", "x" * 256, "é" * 200]),
    (lambda item: item.as_text_in(SHA256), ["", "a" * 63, "A" * 64, "g" * 64, 5, "a" * 65]),
]


@pytest.mark.parametrize(("ask", "values"), WRONG, ids=[ask.__name__ for ask, _ in WRONG])
def test_a_value_of_another_type_or_range_is_named_with_its_place(
    ask: Callable[[JsonValue], object], values: list[Any]
) -> None:
    for value in values:
        with pytest.raises(MalformedFileError) as caught:
            ask(JsonValue({"a": [value]})["a"].as_list()[0])
        assert caught.value.location == "a[0]"
        assert len(str(caught.value)) < 400


def test_ranges_and_missing_keys() -> None:
    item = parse_json('{"a": {"n": 7}}')
    assert item["a"]["n"].as_integer(7, 7) == 7
    with pytest.raises(MalformedFileError, match=r"a\.n = 7: must be from 8 to 9"):
        item["a"]["n"].as_integer(8, 9)
    with pytest.raises(MalformedFileError, match=r"a\.n = 7: must be from 0 to 1"):
        item["a"]["n"].as_number(0, 1)
    with pytest.raises(MalformedFileError, match=r"a\.m = None: is missing"):
        item["a"]["m"]
    with pytest.raises(MalformedFileError, match=r"a = .*: is not a key of this format"):
        item.reject_unknown_keys(["b"])
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


@dataclass(frozen=True)
class Signed:
    value: Annotated[int, lambda item: item.as_integer(-9, 9)]


def test_a_field_may_name_its_reader_and_unknown_keys_may_be_ignored() -> None:
    item = parse_json('{"value": -9, "more": 1}')
    assert item.as_dataclass(Signed, ignore_unknown_keys=True) == Signed(-9)
    with pytest.raises(MalformedFileError, match="more = 1: is not a key of this format"):
        item.as_dataclass(Signed)
    with pytest.raises(MalformedFileError, match="value = 10: must be from -9 to 9"):
        parse_json('{"value": 10}').as_dataclass(Signed)


def test_one_of_some_names_and_the_number_of_a_format() -> None:
    item = parse_json('{"name": "b", "format": 2, "version": "0.9"}')
    assert item["name"].as_word(("a", "b")) == "b"
    with pytest.raises(MalformedFileError, match="name = 'b': must be one of a, c"):
        item["name"].as_word(("a", "c"))
    item.require_format("plan", 2)
    with pytest.raises(UnsupportedFormatError, match=r"reads plan format 3; use Shoestring 0\.9 that wrote it"):
        item.require_format("plan", 3)
    parse_json("{}").require_format("plan", 1, default=1)


def test_a_dataclass_is_built_by_the_types_of_its_fields() -> None:
    text = '{"inner": {"sizes": [1, 2]}, "rate": 1, "rank": null, "on": true}'
    assert parse_json(text).as_dataclass(Outer) == Outer(Inner((1, 2)), 1.0, None, True)
    for old, new, gist in (
        ("[1, 2]", "[1, 2.0]", r"inner\.sizes\[1\] = 2\.0: must be a whole number"),
        ("[1, 2]", "5", r"inner\.sizes = 5: must be a list"),
        ("null", "true", "rank = True: must be a whole number"),
        ('"on": true', '"on": 1', "on = 1: must be true or false"),
        ('"rate": 1, ', "", "rate = None: is missing"),
        ('"on"', '"off"', "off = True: is not a key of this format"),
    ):
        with pytest.raises(MalformedFileError, match=gist):
            parse_json(text.replace(old, new)).as_dataclass(Outer)


@dataclass(frozen=True)
class Ranged:
    port: int | None = between(1, 65535, None)
    mode: str = one_of(("on", "off"), "on")


def test_a_dataclass_is_built_within_the_ranges_of_its_fields() -> None:
    assert parse_json('{"port": 80, "mode": "off"}').as_dataclass(Ranged) == Ranged(80, "off")
    assert parse_json('{"port": null}').as_dataclass(Ranged) == Ranged()
    for text, gist in (
        ('{"port": 0}', "port = 0: must be at least 1, or null"),
        ('{"port": 70000}', "port = 70000: must be at most 65,535, or null"),
        ('{"mode": "of"}', "mode = 'of': must be on or off"),
    ):
        with pytest.raises(MalformedFileError, match=gist):
            parse_json(text).as_dataclass(Ranged)


@dataclass(frozen=True)
class Circle:
    radius: float


@dataclass(frozen=True)
class Square:
    side: float


@dataclass(frozen=True)
class Drawing:
    shapes: tuple[Circle | Square, ...]
    layers: dict[str, int]
    file: str = dataclasses.field(metadata=FILE_NAME.metadata)


def test_unions_mappings_and_names_of_files_are_read_by_their_fields() -> None:
    shapes = '[{"kind": "Square", "side": 2}, {"kind": "Circle", "radius": 1}]'
    text = f'{{"shapes": {shapes}, "layers": {{"top": 3}}, "file": "a"}}'
    drawing = Drawing((Square(2.0), Circle(1.0)), {"top": 3}, "a")
    assert parse_json(text).as_dataclass(Drawing) == drawing
    assert (
        parse_json(text.replace('"file"', '"more": 1, "file"')).as_dataclass(Drawing, ignore_unknown_keys=True)
        == drawing
    )
    for old, new, gist in (
        ("Square", "Cube", r"shapes\[0\]\.kind = 'Cube': must be one of Circle, Square"),
        ('"kind": "Square", ', "", r"shapes\[0\]\.kind = None: is missing"),
        ("side", "radius", r"shapes\[0\]\.radius = 2: is not a key"),
        ("3", "0.5", r"layers\.top = 0\.5: must be a whole number"),
        ('"a"', '"../a"', r"file = '\.\./a': must name a file inside the folder"),
    ):
        with pytest.raises(MalformedFileError, match=gist):
            parse_json(text.replace(old, new)).as_dataclass(Drawing)
