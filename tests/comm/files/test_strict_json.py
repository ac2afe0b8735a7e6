"""JSON from others is read as it is, or what is wrong with it is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from shoestring.comm.files.strict_json import LARGEST, MAX_DEPTH, Item, Malformed, parse_json


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
