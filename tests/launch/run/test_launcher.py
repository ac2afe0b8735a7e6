"""The launcher ends a torchrun whose ranks have exited."""

import subprocess
import sys

import pytest

from shoestring.launch.run.launcher import _wait


def test_torchrun_is_ended_when_its_ranks_have_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoestring.launch.run.launcher._SECONDS_ALONE", 0.2)
    monkeypatch.setattr("shoestring.launch.run.launcher._POLL_SECONDS", 0.05)
    waits = "import subprocess, time; subprocess.run(['sleep', '0.5']); time.sleep(600)"  # as in an exit barrier
    with subprocess.Popen([sys.executable, "-c", waits]) as agent:
        assert _wait(agent) == 0
        assert agent.poll() is not None
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]) as agent:
        assert _wait(agent) == 3
