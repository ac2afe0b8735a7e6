"""launch/quickstart.sh: the arguments of each command, recorded by a stand-in for `shoestring`."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from shoestring.tests.tree import ROOT

ENVIRONMENT = """
SHOESTRING_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
SHOESTRING_BIN="$SHOESTRING_ROOT/bin"
prepare_environment() { :; }
"""
STAND_IN = """#!/usr/bin/env bash
printf '%s|' "$@" >>calls
echo >>calls
[[ "$1" != train ]] || exit "${TRAIN_CODE:-0}"
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    (tmp_path / "launch").mkdir()
    (tmp_path / "bin").mkdir()
    shutil.copy(ROOT / "launch" / "quickstart.sh", tmp_path / "launch")
    (tmp_path / "launch" / "environment.sh").write_text(ENVIRONMENT)
    (tmp_path / "bin" / "shoestring").write_text(STAND_IN)
    (tmp_path / "bin" / "shoestring").chmod(0o755)
    return tmp_path


def calls(clone: Path, *arguments: str, code: int = 0) -> list[str]:
    """Return the recorded calls in order; the script must end with the exit code of the training."""
    script = [str(clone / "launch" / "quickstart.sh"), *arguments]
    done = subprocess.run(
        script, env=os.environ | {"TRAIN_CODE": str(code)}, capture_output=True, timeout=30, check=False
    )
    assert done.returncode == code
    return (clone / "calls").read_text().splitlines()


def test_what_describes_the_run_goes_to_both_verbs(clone: Path) -> None:
    (clone / "runs" / "mine").mkdir(parents=True)
    given = ["data.prepared=data/mine", "--config-dir", "my conf", "training.run_dir=runs/mine", "--fresh"]
    assert calls(clone, *given) == [
        "data|prepare|experiment=quickstart|data.prepared=data/mine|--config-dir|my conf|training.run_dir=runs/mine|",
        f"train|--fresh|experiment=quickstart|{'|'.join(given)}|",
        "budget|runs/mine|",
    ]


@pytest.mark.parametrize(("code", "has_bill"), [(0, True), (1, True), (2, False), (3, True), (75, True)])
def test_a_run_that_was_refused_has_no_budget(clone: Path, code: int, has_bill: bool) -> None:
    (clone / "runs" / "quickstart").mkdir(parents=True)  # of an earlier run
    assert ("budget|runs/quickstart|" in calls(clone, code=code)) == has_bill
