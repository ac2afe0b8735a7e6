"""The dashboard: its file is made from its panels, and wandb's own library reads it back. Not tried on a server."""

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.launch.answers.terminal import terminal_text
from shoestring.launch.compose import compose_run_config
from shoestring.launch.verbs.dashboard import dashboard_answer, save_dashboard
from shoestring.tests.launch.command_line import answer
from shoestring.tests.launch.renderings import check_renderings
from shoestring.tests.tree import ROOT

QUICKSTART = ["experiment=quickstart"]


def test_the_versioned_file_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert (ROOT / "docs" / "dashboard.json").read_text() == answer(capsys, "dashboard", *QUICKSTART)


def test_the_table_lists_the_panels() -> None:
    dashboard = dashboard_answer(compose_run_config(QUICKSTART))
    check_renderings(dashboard, smallest_number_of_quantities=0)
    for words in ("Loss", "loss/mtp", "grad_norm"):
        assert words in terminal_text(dashboard, width=120)


def test_saving_it_without_an_account_is_one_clear_refusal(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", f"{tmp_path}/netrc")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ConfigError) as refusal:
        save_dashboard(compose_run_config(QUICKSTART))
    assert [problem.field for problem in refusal.value.problems] == ["telemetry.wandb.mode", "telemetry.wandb.entity"]
