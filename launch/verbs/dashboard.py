"""`shoestring dashboard`: print the dashboard as a wandb workspace, or create it on a server.

It prints what wandb-workspaces would send, without random ids, so that docs/dashboard.json changes only with the
panels. Creation on a server needs an account and has not been tried.
"""

import argparse
import json
from typing import Any

from ...comm.errors import Problem, raise_if_any
from ...trainer.config import RunConfig
from ...trainer.model.model import router_names
from ...trainer.telemetry.dashboard import Panel, make_dashboard
from ..answers.blocks import Answer, table
from ..answers.options import add_answer_options, add_override_arguments, print_answer
from ..compose import compose_run_config
from ..console import print_to_stdout

_RANDOM = ("__id__", "id", "ref")
_WIDTH = 8
_HEIGHT = 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options; JSON is the default format, as wandb takes it."""
    add_override_arguments(parser)
    parser.add_argument("--save", action="store_true", help="create it on the wandb server instead; needs an account")
    add_answer_options(parser, ("json", "table"))


def run(options: argparse.Namespace) -> int:
    """Print the dashboard, or create it on the server."""
    config = compose_run_config(options.overrides, options.config_dir)
    if not options.save:
        return print_answer(options, dashboard_answer(config))
    print_to_stdout(save_dashboard(config))
    return 0


def dashboard_answer(config: RunConfig) -> Answer:
    """Return the workspace for runs of this configuration; blocks list its panels."""
    spec = _workspace(config)._to_model().spec
    workspace = json.loads(spec.model_dump_json(by_alias=True, exclude_none=True))
    blocks = [
        table(section.name, ("panel", "metrics"), [(panel.title, ", ".join(panel.metrics)) for panel in section.panels])
        for section in make_dashboard(router_names(config.model))
    ]
    return Answer.from_blocks("Dashboard of a run", _without_random_ids(workspace), blocks)


def save_dashboard(config: RunConfig) -> str:
    """Create the workspace on the server and return its URL. Raises `ConfigError` without an account or an entity."""
    from ...trainer.telemetry.wandb_sink import wandb_account_problems

    problems = [*wandb_account_problems()]
    if config.telemetry.wandb.entity is None:
        problems.append(Problem("telemetry.wandb.entity", None, "must name the user or team that owns the project"))
    raise_if_any(problems)
    return str(_workspace(config).save().url)


def _workspace(config: RunConfig) -> Any:
    # Imported here: the import is slow, and only this verb needs it.
    from wandb_workspaces.reports.v2.interface import Layout, LinePlot, ScalarChart, SummaryMetric
    from wandb_workspaces.workspaces.interface import Section, Workspace

    def draw(panel: Panel, place: int) -> Any:
        layout = Layout(x=place % 3 * _WIDTH, y=place // 3 * _HEIGHT, w=_WIDTH, h=_HEIGHT)
        if panel.is_single_value:
            (metric,) = panel.metrics
            return ScalarChart(title=panel.title, metric=SummaryMetric(metric), layout=layout)
        return LinePlot(title=panel.title, x="step", y=list(panel.metrics), layout=layout)

    sections = [
        Section(
            name=section.name, panels=[draw(panel, place) for place, panel in enumerate(section.panels)], is_open=True
        )
        for section in make_dashboard(router_names(config.model))
    ]
    wandb = config.telemetry.wandb
    return Workspace(entity=wandb.entity or "", project=wandb.project, name="Shoestring", sections=sections)


def _without_random_ids(tree: Any) -> Any:
    """Return `tree` without ids that are random in each call, and with sorted keys."""
    if isinstance(tree, dict):
        return {key: _without_random_ids(tree[key]) for key in sorted(tree) if key not in _RANDOM}
    return [_without_random_ids(value) for value in tree] if isinstance(tree, list) else tree
