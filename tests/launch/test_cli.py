"""The real parser: overrides at any place, and no argument ignored."""

from __future__ import annotations

import argparse
import configparser
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoestring.launch import cli
from shoestring.launch.cli import main, parse_arguments
from shoestring.launch.run import node
from shoestring.launch.run.signals import STOP_SIGNALS, ignore_late_stop_signals
from shoestring.tests.tree import ROOT
from shoestring.trainer.run.exit import HaltReason

A, B, C = "experiment=quickstart", "training.run_dir=x", "training.seed=1"


def test_the_same_over_several_machines() -> None:
    options = node.parse_arguments([A, "--fresh", B, "--config-dir", "own", C])
    assert (options.overrides, options.fresh, options.config_dir) == ([A, B, C], True, Path("own"))


def test_both_reach_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", A, "--cfg", "job", "training.seed=7"])
    assert stop.value.code == 0
    assert "  seed: 7\n" in capsys.readouterr().out


def test_a_budget_is_shown_without_torch() -> None:
    """Importing torch takes seconds and 200 MB, too much for a look at a run."""
    program = "import sys, shoestring.launch.cli, shoestring.launch.verbs.budget; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.fixture
def former_handlers() -> Iterator[None]:
    numbers = (*STOP_SIGNALS, signal.SIGINT)
    former = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("former_handlers")
@pytest.mark.parametrize(
    ("verb", "number", "code", "words"),
    [
        *(("train", number, HaltReason.PREEMPTED, "before it began; nothing was trained") for number in STOP_SIGNALS),
        ("train", signal.SIGINT, 130, "stopped by SIGINT"),
        ("data", signal.SIGINT, 130, "stopped by SIGINT"),
    ],
)
def test_a_signal_in_the_first_seconds_ends_with_a_line_and_its_code(
    verb: str,
    number: signal.Signals,
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def be_stopped(options: argparse.Namespace) -> int:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.raise_signal(number)
        return 0

    monkeypatch.setattr(cli, "parse_arguments", lambda arguments: argparse.Namespace(verb=verb, run=be_stopped))
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"shoestring {verb}: stopped by {number.name}")
    assert line.endswith(words)


@pytest.mark.usefixtures("former_handlers")
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_after_the_ranks_have_ended_changes_no_exit_code(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def be_signaled_late(options: argparse.Namespace) -> int:
        ignore_late_stop_signals()
        signal.raise_signal(number)
        return 3

    late = argparse.Namespace(verb="train", run=be_signaled_late)
    monkeypatch.setattr(cli, "parse_arguments", lambda arguments: late)
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 3
    assert capsys.readouterr().err == ""


def test_the_version_is_known_at_run_time(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["--version"])
    assert ended.value.code == 0
    declared = configparser.ConfigParser()
    declared.read(ROOT / "setup.cfg")
    assert capsys.readouterr().out == f"shoestring {declared['metadata']['version']}\n"
