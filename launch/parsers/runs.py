"""Verbs about a run, finished or not: `budget`, `report`, `watch`, `dashboard`, `trace`."""

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
    budget = verbs.add_parser("budget", help="cost of a run, compared with DeepSeek-V3's 2.788 M GPU-hours")
    budget.add_argument("run_or_project", type=Path, metavar="RUN", help="run directory, or project file")
    budget.add_argument(
        "--tokens", metavar="14.8T", help="forecast the cost of this many tokens at this run's rate; needs --gpus"
    )
    budget.add_argument("--gpus", type=int, metavar="N", help="number of GPUs of that forecast")
    budget.add_argument(
        "--usd-per-gpu-hour", type=float, metavar="PRICE", help="USD per GPU-hour (default 2, as in DeepSeek's report)"
    )
    budget.add_argument("--sacct", type=Path, metavar="FILE", help="reconcile with the output of sacct")
    budget.add_argument("--invoice", type=Path, metavar="FILE", help="reconcile with an invoice, a CSV file")
    columns = "names of the invoice's columns for gpu_hours and amount"
    budget.add_argument("--invoice-columns", default="", metavar="gpu_hours=NAME,amount=NAME", help=columns)
    plan = "compare with a plan: output of `shoestring plan` or `simulate` with --format json"
    budget.add_argument("--against", type=Path, metavar="PLAN", help=plan)
    everything = "read every record of the ledger, and compare with its saved totals"
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
    report = verbs.add_parser("report", help="HTML report of a run: loss, cost, timeline, incidents")
    report.add_argument("run_dir", type=Path, metavar="RUN", help="run directory; the run may still be running")
    report.add_argument("--out", type=Path, metavar="PATH", help="output file (default RUN/report.html)")
    report.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    from ..console import print_to_stdout
    from ..verbs.report import write_report

    print_to_stdout(f"Wrote {write_report(options.run_dir, options.out)}")
    return 0


def _add_watch(verbs: Subparsers) -> None:
    watch = verbs.add_parser("watch", help="live view of a run in the terminal, until it ends or Ctrl-C")
    watch.add_argument("run_dir", type=Path, metavar="RUN", help="run directory")
    watch.add_argument("--once", action="store_true", help="print the present state and exit")
    watch.set_defaults(run=_watch)


def _watch(options: argparse.Namespace) -> int:
    from rich.console import Console

    from ..verbs.watch import watch

    watch(options.run_dir, Console(), once=options.once)
    return 0


def _add_dashboard(verbs: Subparsers) -> None:
    dashboard = add_override_arguments(
        verbs.add_parser("dashboard", help="print the wandb workspace for a run's metrics as JSON")
    )
    dashboard.add_argument(
        "--save", action="store_true", help="create it on the wandb server instead; needs an account"
    )
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
    trace = verbs.add_parser("trace", help="time per term of a traced run, and a picture of its timeline")
    trace.add_argument("place", type=Path, metavar="TRACE", help="run directory, or its merged trace.json")
    picture = "write a picture of an overlapped pair of MoE layers"
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
