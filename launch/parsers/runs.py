"""A run, going on or over: what it cost, how it stands, where its time went."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from .options import Verbs, add_format, described, show, with_overrides


def add(verbs: Verbs) -> None:
    """Add this family's verbs."""
    _add_budget(verbs)
    _add_report(verbs)
    _add_watch(verbs)
    _add_dashboard(verbs)
    _add_trace(verbs)


def _add_budget(verbs: Verbs) -> None:
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
    add_format(budget)
    budget.set_defaults(run=_budget)


def _budget(options: argparse.Namespace) -> int:
    from rich.console import Group

    from ..verbs.budget import BudgetQuery, budget_tables, budget_tree

    names = [field.name for field in fields(BudgetQuery) if field.name != "run"]
    question = BudgetQuery(options.run_or_project, **{name: getattr(options, name) for name in names})
    show(options, lambda: Group(*budget_tables(question)), lambda: budget_tree(question))
    return 0


def _add_report(verbs: Verbs) -> None:
    report = verbs.add_parser("report", help="a run as one HTML page: curves, bill, timeline, incidents")
    report.add_argument("run_dir", type=Path, metavar="RUN", help="directory of a run, which may be going on")
    report.add_argument("--out", type=Path, metavar="PATH", help="write there (default: RUN/report.html)")
    report.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    from ..say import tell
    from ..verbs.report import write_report

    tell(f"wrote {write_report(options.run_dir, options.out)}")
    return 0


def _add_watch(verbs: Verbs) -> None:
    watch = verbs.add_parser("watch", help="follow a run in the terminal until it has ended, or Ctrl-C")
    watch.add_argument("run_dir", type=Path, metavar="RUN", help="directory of a run")
    watch.add_argument("--once", action="store_true", help="print how it stands, and be done")
    watch.set_defaults(run=_watch)


def _watch(options: argparse.Namespace) -> int:
    from rich.console import Console

    from ..verbs.watch import watch

    watch(options.run_dir, Console(), once=options.once)
    return 0


def _add_dashboard(verbs: Verbs) -> None:
    dashboard = with_overrides(verbs.add_parser("dashboard", help="the wandb workspace for a run's metrics, as JSON"))
    dashboard.add_argument("--save", action="store_true", help="create it on wandb's server instead; needs an account")
    dashboard.set_defaults(run=_dashboard)


def _dashboard(options: argparse.Namespace) -> int:
    from ..say import give, tell
    from ..verbs.dashboard import dashboard_json, save_dashboard

    if options.save:
        tell(save_dashboard(*described(options)))
    else:
        give(dashboard_json(*described(options)))
    return 0


def _add_trace(verbs: Verbs) -> None:
    trace = verbs.add_parser("trace", help="what a traced run's timeline adds up to, and a picture of it")
    trace.add_argument("place", type=Path, metavar="TRACE", help="a run's directory, or its merged trace.json")
    picture = "draw a forward's and a backward's layer in turns there"
    trace.add_argument("--svg", type=Path, metavar="FILE", help=picture)
    add_format(trace)
    trace.set_defaults(run=_trace)


def _trace(options: argparse.Namespace) -> int:
    from ..verbs.trace import open_trace, trace_table, trace_tree, write_picture

    ranks = open_trace(options.place)
    if options.svg is not None:
        write_picture(ranks, options.svg)
    show(options, lambda: trace_table(ranks), lambda: trace_tree(ranks))
    return 0
