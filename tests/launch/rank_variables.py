"""The environment variables that torchrun gives its ranks."""

import pytest

from shoestring.tests.launch.small_run import free_port


def in_torchrun(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name in ("LOCAL_RANK", "SHOESTRING_LAUNCHER_PID", "SHOESTRING_ATTEMPT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())} | variables).items():
        monkeypatch.setenv(name, value)
