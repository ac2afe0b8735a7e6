"""Every panel of the dashboard, read back by wandb's own library."""

from typing import Any

from shoestring.launch.compose import compose_run_config
from shoestring.launch.verbs.dashboard import dashboard_answer
from shoestring.trainer.model.model import router_names
from shoestring.trainer.telemetry.dashboard import make_dashboard

QUICKSTART = ["experiment=quickstart"]


def test_every_panel_is_in_the_workspace() -> None:
    workspace: Any = dashboard_answer(compose_run_config(QUICKSTART)).data
    sections = workspace["section"]["panelBankConfig"]["sections"]
    wanted = make_dashboard(router_names(compose_run_config(QUICKSTART).model))
    assert [section["name"] for section in sections] == [section.name for section in wanted]
    for drawn, section in zip(sections, wanted, strict=True):
        assert [panel["config"]["chartTitle"] for panel in drawn["panels"]] == [p.title for p in section.panels]
        for panel, metrics in zip(drawn["panels"], (p.metrics for p in section.panels), strict=True):
            shown = [metric.removeprefix("summary_metrics.") for metric in panel["config"]["metrics"]]
            assert shown == list(metrics)
