"""Damaged files and command lines end in exit code 0, a refusal, or another documented exit code."""

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from .kinds import KINDS
from .mutate import dumps, mutate_tree, places


def fuzz(tmp_path: Path, *options: object) -> tuple[dict[str, float], str]:
    """Run the fuzzer in another process, because it forks and pytest has threads. Return its summary and its output."""
    summary = tmp_path / "summary.json"
    command = [sys.executable, "-m", "shoestring.tests.fuzz", "--json", summary, *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=900)
    words = done.stdout + done.stderr
    assert done.returncode == 0, words[-20_000:]
    found: dict[str, float] = json.loads(summary.read_text())
    return found, words


def test_some_inputs_of_every_kind(tmp_path: Path) -> None:
    found, words = fuzz(tmp_path, "--each", 2)
    assert found["inputs"] == 2 * len(KINDS) == 20
    assert found["wrong"] == 0, words
    assert 0.3 < found["covered"] < 0.9  # lines of the readers are counted, and there are more


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_two_thousand_inputs_and_the_lines_of_the_readers(tmp_path: Path) -> None:
    found, words = fuzz(tmp_path, "--each", 200)
    print(words)
    assert found["inputs"] == 2000
    assert found["wrong"] == 0, words
    assert found["slowest"] < 10
    assert found["covered"] >= 0.9, words


def test_a_trial_that_goes_wrong_is_reported(tmp_path: Path) -> None:
    """A traceback, another exit code, a leftover file and a hang are each detected."""
    code = """
import sys, time
from pathlib import Path
from shoestring.tests.fuzz import trial
from shoestring.tests.fuzz.kinds import reads
from shoestring.tests.fuzz.lines import Lines

root = Path(sys.argv[1])

def act(arguments):
    if arguments[0] == "raise":
        raise ValueError("an unexpected error")
    if arguments[0] == "spin":
        while True:
            pass
    (root / "made").mkdir()
    print("error: invalid")
    sys.exit(int(arguments[0]))

trial.main, trial.CPU_SECONDS = act, 1
for number, word in enumerate(("raise", "spin", "3", "2")):
    trial.KINDS = {"own": lambda random, seeds, folder: reads(word, made=root / "made")}
    print(trial.run_trial("own", 0, root, root / f"t{number}", Lines()).wrong)
    (root / "made").rmdir() if (root / "made").exists() else None
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["a traceback", "a hang", "exit code 3", f"{tmp_path / 'made'} is left"]


def test_a_kind_and_a_seed_are_one_input() -> None:
    tree = {"a": [1, {"b": "c"}], "d": 2.5, "e": None}
    for seed in range(50):
        once, again = (dumps(mutate_tree(Random(seed), json.loads(json.dumps(tree)))) for _ in range(2))
        assert once == again
    assert len(places(tree)) == 6
    changed = {dumps(mutate_tree(Random(seed), json.loads(json.dumps(tree)))) for seed in range(50)}
    assert len(changed) > 40
    assert any(raw.count(b'"a":') == 2 for raw in changed)  # a key that stands twice
