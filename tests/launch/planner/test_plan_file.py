"""A plan file gives a run's forecast; other formats and damaged files are refused."""

import json
from pathlib import Path

import pytest

from shoestring import __version__
from shoestring.comm.errors import ConfigError
from shoestring.launch.compose import compose_run_config
from shoestring.launch.planner.plan_file import PLAN_FORMAT, read_plan_entry


@pytest.mark.parametrize(
    ("text", "gist"),
    [
        ("", "is not a plan"),
        ("[]", "is not a plan: must be a mapping of keys"),
        ("{}", "is not a plan; write one with"),
        ('{"format": 2}', "is not a plan: run is missing"),
        ('{"format": 2, "run": null}', "is not a plan: run must be a mapping of keys"),
        ('{"format": 2, "run": {"model": 1}}', "is not a plan: run.model must be a mapping of keys"),
        ('{"format": 2, "run": {"model": {}}}', "is not a plan: run.sequence_length is missing"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(text: str, gist: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(ConfigError, match=r"--against = .*cannot be read: No such file"):
        read_plan_entry(path, compose_run_config([]), None)
    path.write_text(text)
    with pytest.raises(ConfigError, match=gist):
        read_plan_entry(path, compose_run_config([]), None)


@pytest.mark.parametrize(
    ("tree", "writer"),
    [
        ({"of": {}, "layout": {}}, "of format 1, written by Shoestring 0.1 or earlier"),
        ({"of": {}, "layouts": []}, "of format 1, written by Shoestring 0.1 or earlier"),
        ({"format": 3, "version": "0.9", "plan": {}}, "of format 3, written by Shoestring 0.9"),
    ],
)
def test_a_plan_of_another_format_is_refused_by_its_format(
    tree: dict[str, object], writer: str, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=f"is a plan {writer}; Shoestring {__version__} reads format {PLAN_FORMAT}"):
        read_plan_entry(path, compose_run_config([]), None)
