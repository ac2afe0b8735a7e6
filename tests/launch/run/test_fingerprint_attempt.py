"""The ledger's name for a launch that another launcher made: equal for its restarts, another for the next launch."""

import os
import subprocess
import sys

import pytest

from shoestring.launch.run.fingerprint import ATTEMPT_ENV_VAR, attempt_name

AGENT = """
import subprocess, sys
SHOW = "from shoestring.launch.run.fingerprint import attempt_name; print(attempt_name())"
for _ in range(2):
    subprocess.run([sys.executable, "-c", SHOW])
"""


def test_the_launcher_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ATTEMPT_ENV_VAR, "given")
    assert attempt_name() == "given"


def test_a_users_torchrun_is_known_by_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ATTEMPT_ENV_VAR, raising=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    assert attempt_name().startswith(f"mine.{os.getppid()}.")
    agents = [subprocess.run([sys.executable, "-c", AGENT], capture_output=True, text=True, check=True) for _ in "ab"]
    names = [agent.stdout.split() for agent in agents]
    assert [len(set(of_agent)) for of_agent in names] == [1, 1]
    assert names[0] != names[1]
