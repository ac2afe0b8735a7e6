"""The dashboard: its file is made from its panels, and wandb's own library reads it back. Not tried on a server."""

from __future__ import annotations

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.launch.verbs.dashboard import dashboard_json, save_dashboard
from shoestring.tests.tree import ROOT

QUICKSTART = ["experiment=quickstart"]


def test_the_versioned_file_is_what_the_command_prints() -> None:
    assert (ROOT / "docs" / "dashboard.json").read_text() == dashboard_json(QUICKSTART, None) + "\n"


def test_saving_it_without_an_account_is_one_clear_refusal(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", f"{tmp_path}/netrc")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ConfigError) as refusal:
        save_dashboard(QUICKSTART, None)
    assert [problem.field for problem in refusal.value.problems] == ["telemetry.wandb.mode", "telemetry.wandb.entity"]
