"""The configuration of telemetry: all its problems in one error."""

from pathlib import Path

import pytest

from shoestring.trainer.telemetry.config import TelemetryConfig, WandbConfig


@pytest.fixture(autouse=True)
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT", "WANDB_RUN_ID", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)


def test_all_problems_of_the_configuration_are_listed() -> None:
    config = TelemetryConfig(log_every=0, wandb=WandbConfig(mode="of", project=""))
    assert [problem.field for problem in config.problems()] == ["log_every", "wandb.mode", "wandb.project"]
    assert not list(TelemetryConfig().problems())
