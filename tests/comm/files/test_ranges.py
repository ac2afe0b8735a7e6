"""Ranges declared beside fields: what they refuse, and what the reference prints."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from typing_extensions import override

from shoestring.comm.errors import Problem
from shoestring.comm.files.ranges import (
    CheckedConfig,
    above,
    at_least,
    between,
    field_range,
    fraction,
    not_empty,
    one_of,
)


@dataclass(frozen=True, kw_only=True)
class Wheel(CheckedConfig):
    spokes: int = between(3, 4096, 36, most_reason=", more than any rim has room for")
    width: float = above(0, 1.5)


@dataclass(frozen=True, kw_only=True)
class Bicycle(CheckedConfig):
    gears: int | None = at_least(1, None, null="for a fixed gear")
    brake: str = one_of(("rim", "disc", "none"), "rim")
    slip: float = fraction(0.0)
    grip: float | None = fraction(None, zero=False)
    name: str = not_empty("bike")
    wheel: Wheel = dataclasses.field(default_factory=Wheel)
    seats: int = at_least(1)

    @override
    def rule_problems(self) -> Iterator[Problem]:
        if self.gears is not None and self.gears > 1 and self.brake == "none":
            yield Problem("brake", self.brake, "gears need a brake", ("gears",))


@pytest.mark.parametrize(
    ("values", "field", "hint"),
    [
        ({"gears": 0}, "gears", "must be at least 1, or null for a fixed gear"),
        ({"brake": "drum"}, "brake", "must be rim, disc or none"),
        ({"slip": 1.0}, "slip", "must be less than 1"),
        ({"slip": float("nan")}, "slip", "must be a finite number"),
        ({"grip": 0.0}, "grip", "must be greater than 0, or null"),
        ({"name": ""}, "name", "must not be empty"),
        ({"seats": 0}, "seats", "must be at least 1"),
        ({"wheel": Wheel(spokes=2)}, "wheel.spokes", "must be at least 3"),
        ({"wheel": Wheel(spokes=10**400)}, "wheel.spokes", "must be at most 4,096, more than any rim has room for"),
        ({"wheel": Wheel(width=0.0)}, "wheel.width", "must be greater than 0"),
        ({"gears": 3, "brake": "none"}, "brake", "gears need a brake"),
    ],
)
def test_a_value_outside_its_range_or_rule_is_a_problem(values: dict[str, Any], field: str, hint: str) -> None:
    (problem,) = Bicycle(**{"seats": 1} | values).problems()
    assert (problem.field, problem.hint) == (field, hint)


def test_values_inside_and_null_are_no_problem() -> None:
    assert not list(Bicycle(seats=1).problems())


def test_each_range_is_in_words_and_a_field_without_a_default_is_required() -> None:
    texts = {field.name: found.text for field in dataclasses.fields(Bicycle) if (found := field_range(field))}
    assert texts == {
        "gears": "at least 1",
        "brake": "`rim`, `disc`, `none`",
        "slip": "at least 0, less than 1",
        "grip": "greater than 0, less than 1",
        "name": "not empty",
        "seats": "at least 1",
    }
    assert {field.name: field_range(field) for field in dataclasses.fields(Wheel)}["spokes"].text == "3 to 4,096"  # type: ignore[union-attr]
    with pytest.raises(TypeError, match="seats"):
        Bicycle()
