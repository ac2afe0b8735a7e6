"""A run, going on or over: what it cost, how it stands, where its time went."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from .options import Subparsers, add_format_option, add_override_arguments, get_overrides, print_result


def add_commands(verbs: Subparsers) -> None:
    """Add this family's verbs."""
    _add_budget(verbs)
    _add_report(verbs)
    _add_watch(verbs)
    _add_dashboard(verbs)
    _add_trace(verbs)


def _add_budget(verbs: Subparsers) -> None:
    budget = verbs.add_parser("budget", help="what a run has cost, beside the published 2.788 M GPU-hours")
    budget.add_argument("run_or_project", type=Path, metavar="RUN", help="directory of a run, or a project file")
    budget.add_argument("--tokens", metavar="14.8T", help="what so many tokens would cost at this run's price")
    budget.add_argument("--gpus", type=int, metavar="N", help="and how long N such GPUs would take")
    budget.add_argument("--usd-per-gpu-hour", type=float, metavar="PRICE", help="default 2, as in the report")
    budget.add_argument("--sacct", type=Path, metavar="FILE", help="compare with the output of sacct")
    budget.add_argument("--invoice", type=Path, metavar="FILE", help="compare with an invoice, a CSV")
    columns = "what the CSV calls gpu_hours and amount"
    budget.add_argument("--invoice-columns", default="", metavar="gpu_hours=NAME,amount=NAME", help=columns)
    plan = "compare with a plan: what shoestring plan or simulate prints with --format json"
    budget.add_argument("--against", type=Path, metavar="PLAN", help=plan)
    everything = "read every record of the ledger, and compare the totals that are saved beside it"
    budget.add_argument("--verify", action="store_true", help=everything)
    add_format_option(budget)
    budget.set_defaults(run=_budget)


def _budget(options: argparse.Namespace) -> int:
    from rich.console import Group

    from ..verbs.budget import BudgetQuery, budget_as_dict, budget_tables

    names = [field.name for field in fields(BudgetQuery) if field.name != "run_or_project"]
    question = BudgetQuery(options.run_or_project, **{name: getattr(options, name) for name in names})
    print_result(options, lambda: Group(*budget_tables(question)), lambda: budget_as_dict(question))
    return 0


def _add_report(verbs: Subparsers) -> None:
    report = verbs.add_parser("report", help="a run as one HTML page: curves, bill, timeline, incidents")
    report.add_argument("run_dir", type=Path, metavar="RUN", help="directory of a run, which may be going on")
    report.add_argument("--out", type=Path, metavar="PATH", help="write there (default: RUN/report.html)")
    report.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    from ..console import print_to_stdout
    from ..verbs.report import write_report

    print_to_stdout(f"wrote {write_report(options.run_dir, options.out)}")
    return 0


def _add_watch(verbs: Subparsers) -> None:
    watch = verbs.add_parser("watch", help="follow a run in the terminal until it has ended, or Ctrl-C")
    watch.add_argument("run_dir", type=Path, metavar="RUN", help="directory of a run")
    watch.add_argument("--once", action="store_true", help="print how it stands, and be done")
    watch.set_defaults(run=_watch)


def _watch(options: argparse.Namespace) -> int:
    from rich.console import Console

    from ..verbs.watch import watch

    watch(options.run_dir, Console(), once=options.once)
    return 0


def _add_dashboard(verbs: Subparsers) -> None:
    dashboard = add_override_arguments(
        verbs.add_parser("dashboard", help="the wandb workspace for a run's metrics, as JSON")
    )
    dashboard.add_argument("--save", action="store_true", help="create it on wandb's server instead; needs an account")
    dashboard.set_defaults(run=_dashboard)


def _dashboard(options: argparse.Namespace) -> int:
    from ..console import print_or_raise, print_to_stdout
    from ..verbs.dashboard import dashboard_json, save_dashboard

    if options.save:
        print_to_stdout(save_dashboard(*get_overrides(options)))
    else:
        print_or_raise(dashboard_json(*get_overrides(options)))
    return 0


def _add_trace(verbs: Subparsers) -> None:
    trace = verbs.add_parser("trace", help="what a traced run's timeline adds up to, and a picture of it")
    trace.add_argument("place", type=Path, metavar="TRACE", help="a run's directory, or its merged trace.json")
    picture = "draw a forward's and a backward's layer in turns there"
    trace.add_argument("--svg", type=Path, metavar="FILE", help=picture)
    add_format_option(trace)
    trace.set_defaults(run=_trace)


def _trace(options: argparse.Namespace) -> int:
    from ..verbs.trace import open_trace, trace_as_dict, trace_time_table, write_layer_pair_svg

    ranks = open_trace(options.place)
    if options.svg is not None:
        write_layer_pair_svg(ranks, options.svg)
    print_result(options, lambda: trace_time_table(ranks), lambda: trace_as_dict(ranks))
    return 0
