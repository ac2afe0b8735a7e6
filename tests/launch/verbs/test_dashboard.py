"""The dashboard: its file is that of its panels, and wandb's own library reads it back. No server has seen it."""

from __future__ import annotations

import json

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.launch.compose import compose_run
from shoestring.launch.verbs.dashboard import dashboard_json, save_dashboard
from shoestring.tests.tree import ROOT
from shoestring.trainer.model.model import router_names
from shoestring.trainer.telemetry.dashboard import dashboard

QUICKSTART = ["experiment=quickstart"]


def test_the_versioned_file_is_what_the_command_prints() -> None:
    assert (ROOT / "docs" / "dashboard.json").read_text() == dashboard_json(QUICKSTART, None) + "\n"


def test_every_panel_is_in_the_workspace() -> None:
    text = dashboard_json(QUICKSTART, None)
    sections = json.loads(text)["section"]["panelBankConfig"]["sections"]
    wanted = dashboard(router_names(compose_run(QUICKSTART).model))
    assert [section["name"] for section in sections] == [section.name for section in wanted]
    for drawn, section in zip(sections, wanted, strict=True):
        assert [panel["config"]["chartTitle"] for panel in drawn["panels"]] == [p.title for p in section.panels]
        for panel, metrics in zip(drawn["panels"], (p.metrics for p in section.panels), strict=True):
            shown = [metric.removeprefix("summary_metrics.") for metric in panel["config"]["metrics"]]
            assert shown == list(metrics)


def test_saving_it_without_an_account_is_one_clear_refusal(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", f"{tmp_path}/netrc")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ConfigError) as refusal:
        save_dashboard(QUICKSTART, None)
    assert [problem.field for problem in refusal.value.problems] == ["telemetry.wandb.mode", "telemetry.wandb.entity"]
