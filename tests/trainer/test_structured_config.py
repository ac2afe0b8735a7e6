"""Plain values become the types that a dataclass names; every value that does not fit is a problem."""

import copy
import math
import pickle
from dataclasses import asdict, dataclass, field, make_dataclass, replace

import pytest

from shoestring.comm.errors import Problem
from shoestring.launch.compose import compose_run_config
from shoestring.tests.launch.refusals import refused
from shoestring.trainer.structured_config import InterpolatedText, build_dataclass, restore_interpolations


@dataclass(frozen=True, kw_only=True)
class Wheel:
    spokes: int = 32
    width: float = 28.0


@dataclass(frozen=True, kw_only=True)
class Bicycle:
    owner: str
    gears: int | None = None
    locked: bool = False
    spare: Wheel | None = None
    wheel: Wheel = field(default_factory=Wheel)
    colors: tuple[str, ...] = ()
    price_by_year: dict[int, float] = field(default_factory=dict)


def test_fields_left_out_keep_their_defaults() -> None:
    assert build_dataclass(Bicycle, {"owner": "Ada"}) == Bicycle(owner="Ada")


def test_every_kind_of_field() -> None:
    tree = {
        "owner": "Ada",
        "gears": 11,
        "locked": True,
        "spare": {"width": 32},
        "wheel": {"spokes": 36.0},
        "colors": ["red", "green"],
        "price_by_year": {2024: 900, 2.025e3: 950.5},
    }
    made = build_dataclass(Bicycle, tree)
    assert made == Bicycle(
        owner="Ada",
        gears=11,
        locked=True,
        spare=Wheel(width=32.0),
        wheel=Wheel(spokes=36),
        colors=("red", "green"),
        price_by_year={2024: 900.0, 2025: 950.5},
    )
    assert made.spare is not None
    kinds = (type(made.wheel.spokes), type(made.spare.width), {type(year) for year in made.price_by_year})
    assert kinds == (int, float, {int})


@pytest.mark.parametrize(("value", "whole"), [(3, 3), (1e6, 10**6), (-2.0, -2), (2**70, 2**70)])
def test_a_whole_number_may_be_written_as_a_float(value: float, whole: int) -> None:
    spokes = build_dataclass(Wheel, {"spokes": value}).spokes
    assert (spokes, type(spokes)) == (whole, int)


@pytest.mark.parametrize("value", [1.5, True, "3", None, math.inf, math.nan, [3]])
def test_what_is_no_whole_number(value: object) -> None:
    assert refused(build_dataclass, Wheel, {"spokes": value}) == {"spokes": f"{value!r}: must be a whole number"}


@pytest.mark.parametrize("value", [True, "3", None, math.inf, -math.inf, math.nan, {}, 10**400])
def test_what_is_no_finite_number(value: object) -> None:
    assert refused(build_dataclass, Wheel, {"width": value}) == {"width": f"{value!r}: must be a finite number"}


def test_an_optional_field_takes_its_kind_or_nothing() -> None:
    assert build_dataclass(Bicycle, {"owner": "Ada", "gears": None, "spare": None}) == Bicycle(owner="Ada")
    problems = refused(build_dataclass, Bicycle, {"owner": "Ada", "gears": "many", "spare": 3})
    assert problems == {"gears": "'many': must be a whole number", "spare": "3: must be a group of keys"}


def test_everything_that_is_wrong_is_named_together_by_its_path() -> None:
    tree = {
        "onwer": "Ada",
        "wheel": {"spoks": 36, "width": "wide"},
        "spare": {"spokes": 1.5},
        "colors": ["red", 5],
        "price_by_year": {"now": 900, 2025: "much"},
        "locked": 1,
    }
    assert refused(build_dataclass, Bicycle, tree, [Problem("command line", "x", "found before")]) == {
        "command line": "'x': found before",
        "owner": "None: is missing and has no default",
        "onwer": "'Ada': no such key; did you mean owner?",
        "wheel.spoks": "36: no such key; did you mean spokes?",
        "wheel.width": "'wide': must be a finite number",
        "spare.spokes": "1.5: must be a whole number",
        "colors[1]": "5: must be text",
        "price_by_year": "'now': must be a whole number",
        "price_by_year.2025": "'much': must be a finite number",
        "locked": "1: must be true or false",
    }


def test_a_key_like_no_other_is_answered_with_all_there_are() -> None:
    assert refused(build_dataclass, Wheel, {"rim": 1}) == {"rim": "1: no such key; there are: spokes, width"}


def test_a_long_list_of_keys_is_not_printed() -> None:
    many = make_dataclass("Many", [(f"field{i}", int, 0) for i in range(9)])
    assert refused(build_dataclass, many, {"rim": 1}) == {"rim": "1: no such key; see docs/configuration.md"}


def test_a_key_that_resembles_part_of_a_name_is_answered_with_the_name() -> None:
    made = make_dataclass("Made", [("rampup_start_size", int, 0), ("sample_prompt", str, "")])
    assert "did you mean rampup_start_size?" in refused(build_dataclass, made, {"start_siz": 1})["start_siz"]
    assert "there are:" in refused(build_dataclass, made, {"ramp_from": 1})["ramp_from"]


def test_problems_found_before_are_refused_also_when_all_fits() -> None:
    assert refused(build_dataclass, Wheel, {}, [Problem("a", 1, "b")]) == {"a": "1: b"}


@pytest.mark.parametrize("tree", [None, 3, ["owner"], "owner"])
def test_a_tree_must_be_keys(tree: object) -> None:
    assert refused(build_dataclass, Wheel, tree) == {"": f"{tree!r}: must be a group of keys"}


def test_copies_keep_the_source() -> None:
    text = InterpolatedText("value", "${oc.env:X}")
    config = compose_run_config([])
    held = replace(config, training=replace(config.training, run_dir=text))
    for copied in (
        copy.deepcopy(text),
        copy.copy(text),
        pickle.loads(pickle.dumps(text)),
        asdict(held)["training"]["run_dir"],
    ):
        assert (copied, copied.source) == ("value", "${oc.env:X}")
    assert restore_interpolations({"a": [text, (text, 1)]}) == {"a": ["${oc.env:X}", ["${oc.env:X}", 1]]}
