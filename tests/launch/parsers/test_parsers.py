"""The parsers of all verbs: overrides wherever they stand, nothing swallowed, and nothing loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest

from shoestring.launch.cli import parse_arguments

A, B, C = "experiment=quickstart", "training.run_dir=x", "training.seed=1"


@pytest.mark.parametrize(
    ("arguments", "overrides"),
    [
        (["train", A, "--fresh", B], [A, B]),
        (["train", "--fresh", A, B], [A, B]),
        (["train", A, "--config-dir", "own", B, "--fresh", C], [A, B, C]),
        (["simulate", A, "--format", "json", B], [A, B]),
        (["plan", "--keep", "3", A, "--skew", "0.1", B], [A, B]),
        (["data", "prepare", A, "--config-dir", "own", B], [A, B]),
        (["cluster", "--nodes", "2", "--gpus-per-node", "2", "--", A, B], [A, B]),
        (["cluster", A, "--nodes", "2", B, "--gpus-per-node", "2", "--", C], [A, B, C]),
        (["train"], []),
    ],
)
def test_overrides_on_both_sides_of_an_option(arguments: list[str], overrides: list[str]) -> None:
    options = parse_arguments(arguments)
    assert options.overrides == overrides
    assert getattr(options, "fresh", True) is ("--fresh" in arguments or "fresh" not in options)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", A, "--frsh", B], "--frsh"),
        (["train", A, "--fresh", "--bogus", B], "--bogus"),
        (["checkpoint", "ls", "run", "other"], "other"),
        (["doctor", A], A),
    ],
)
def test_what_nobody_knows_is_refused(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_arguments(arguments)
    assert stop.value.code == 2
    assert f"unrecognized arguments: {named}" in capsys.readouterr().err


def test_no_verb_loads_anything_before_it_runs() -> None:
    code = "import sys; from shoestring.launch.cli import parse_arguments; parse_arguments(['train']); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "shoestring.launch.parsers.training" in loaded
    assert not {"torch", "numpy", "omegaconf", "rich"}.intersection(loaded)
