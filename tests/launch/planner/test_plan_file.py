"""A plan file gives a run's forecast, and damaged files are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.launch.compose import compose_run_config
from shoestring.launch.planner.plan_file import read_plan_entry


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"of": null}', '{"of": {"model": 1}}'])
def test_a_file_that_is_no_plan_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(ConfigError, match=r"--against = .*cannot be read: No such file"):
        read_plan_entry(path, compose_run_config([]), None)
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"--against = .*is not a plan of this version"):
        read_plan_entry(path, compose_run_config([]), None)
