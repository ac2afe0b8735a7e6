"""The parsers of all verbs: overrides at any place, no argument ignored, no heavy import; and how a verb ends."""

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
def test_an_unknown_option_is_refused(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_arguments(arguments)
    assert stop.value.code == 2
    assert f"unrecognized arguments: {named}" in capsys.readouterr().err


LIGHT = {
    "train": [],
    "cluster": ["--nodes", "2", "--gpus-per-node", "2"],
    "schedule": ["1f1b", "--pp", "2", "--micro-batches", "4"],
    "rehearse": [],
    "bench": ["exchange"],
    "budget": ["run"],
    "report": ["run"],
    "watch": ["run"],
    "trace": ["run"],
    "checkpoint": ["ls", "run"],
    "data": ["inspect"],
}
"""Verbs whose options are read without torch, which takes seconds to load, and their least arguments."""
OTHERS = {
    "params": [],
    "memory": [],
    "partition": ["--stages", "2"],
    "simulate": [],
    "plan": [],
    "calibrate": [],
    "doctor": [],
    "dashboard": [],
    "import": ["from", "to"],
    "export": ["run", "to"],
    "generate": ["run", "--prompt", "x"],
}
NO_ANSWER = {"train", "cluster", "watch", "import", "export"}
"""Verbs that do something and answer no question."""


@pytest.mark.parametrize(("verb", "arguments"), [*LIGHT.items(), *OTHERS.items()])
def test_every_verb_is_parsed(verb: str, arguments: list[str]) -> None:
    options = parse_arguments([verb, *arguments])
    assert options.verb == verb
    assert callable(options.run)
    if verb not in NO_ANSWER:
        assert {"format", "html"} <= vars(options).keys()


def test_all_verbs_are_covered() -> None:
    assert {*LIGHT, *OTHERS} == set(cli._VERBS)


def test_a_verb_loads_its_own_module_only_and_nothing_heavy() -> None:
    lines = [[verb, *arguments] for verb, arguments in LIGHT.items()]
    code = (
        "import sys; from shoestring.launch.cli import parse_arguments\n"
        f"for line in {lines}:\n"
        "    parse_arguments(line); print(line[0], *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {words[0]: set(words[1:]) for words in map(str.split, done.stdout.splitlines())}
    assert not any("shoestring.launch.verbs." in name for name in loaded["train"])
    for verb, names in loaded.items():
        assert not {"torch", "numpy", "omegaconf", "rich", "jinja2"} & names, verb


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
