"""A run before it starts: `simulate` and `plan` price it, `calibrate` measures for them, `rehearse` runs its code."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...comm.errors import ConfigError, Problem
from .options import Subparsers, add_format_option, add_override_arguments, get_overrides, print_result


def add_commands(verbs: Subparsers) -> None:
    """Add this family's verbs."""
    _add_simulate(verbs)
    _add_plan(verbs)
    _add_calibrate(verbs)
    _add_rehearse(verbs)


def _add_simulate(verbs: Subparsers) -> None:
    simulate = add_override_arguments(
        verbs.add_parser("simulate", help="one layout priced and explained, before it runs")
    )
    simulate.add_argument("--trace", type=Path, metavar="FILE", help="write a timeline for Perfetto")
    simulate.add_argument("--html", type=Path, metavar="FILE", help="write a page with timeline and memory")
    add_format_option(simulate)
    _add_inputs(simulate)
    simulate.set_defaults(run=_simulate)


def _simulate(options: argparse.Namespace) -> int:
    from ..verbs.simulate import simulate, simulation_as_dict, simulation_table, write_trace_and_html

    simulation = simulate(*get_overrides(options), _inputs(options))
    write_trace_and_html(simulation, options.trace, options.html)
    print_result(options, lambda: simulation_table(simulation), lambda: simulation_as_dict(simulation))
    return 0


def _add_plan(verbs: Subparsers) -> None:
    plan = add_override_arguments(verbs.add_parser("plan", help="layouts searched and priced against the budget"))
    plan.add_argument("--keep", type=int, default=5, metavar="N", help="layouts to print (default 5)")
    add_format_option(plan)
    plan.add_argument("--html", type=Path, metavar="FILE", help="write a page of the best layout, with its timeline")
    _add_inputs(plan)
    plan.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> int:
    from ..verbs.plan import plan, plan_as_dict, plan_table, write_plan_html

    result = plan(*get_overrides(options), options.keep, _inputs(options))
    if options.html is not None:
        write_plan_html(result, options.html)
    print_result(options, lambda: plan_table(result), lambda: plan_as_dict(result))
    return 0


def _add_calibrate(verbs: Subparsers) -> None:
    text = "measure this machine's parts for the planner, as a cluster of its own"
    calibrate = add_override_arguments(verbs.add_parser("calibrate", help=text))
    folder = Path("runs/calibration")
    calibrate.add_argument("--output", type=Path, default=folder, metavar="DIR", help=f"default {folder}")
    calibrate.add_argument("--ranks", type=int, default=2, metavar="N", help="processes at work (default 2)")
    calibrate.add_argument("--repeats", type=int, default=20, metavar="N", help="of each measurement (default 20)")
    calibrate.set_defaults(run=_calibrate)


def _calibrate(options: argparse.Namespace) -> int:
    from ..console import print_to_stdout
    from ..verbs.calibrate import calibrate

    written = calibrate(*get_overrides(options), options.output, options.ranks, options.repeats)
    print_to_stdout(f"wrote {written}; price with it: --config-dir {options.output} cluster=measured")
    return 0


def _add_rehearse(verbs: Subparsers) -> None:
    text = "one step of a GPU run's real code, rank by rank on fake CUDA tensors: no GPU and no data are needed"
    rehearse = add_override_arguments(verbs.add_parser("rehearse", help=text))
    ranks = rehearse.add_mutually_exclusive_group()
    ranks.add_argument("--ranks", metavar="R,R,…", help="ranks to rehearse, as 0,7,901")
    text = "one rank of each pipeline position, and a second member of one EP group and of one edp group (the default)"
    ranks.add_argument("--representative", action="store_true", help=text)
    text = "of one rank in the step (default: those of the run's first step)"
    rehearse.add_argument("--micro-batches", type=int, metavar="N", help=text)
    text = "list the N operations of an expert layer that move the most bytes (default 0)"
    rehearse.add_argument("--passes", type=int, default=0, metavar="N", help=text)
    add_format_option(rehearse)
    rehearse.set_defaults(run=_rehearse)


def _rehearse(options: argparse.Namespace) -> int:
    from ..console import print_to_stderr

    if options.passes < 0:
        raise ConfigError([Problem("--passes", options.passes, "must be at least 0")])
    print_to_stderr("reading the configuration")  # before torch is loaded, which takes seconds
    from ..rehearsal.tables import rehearsal_tables, rehearsal_to_dict
    from ..run.launcher import StoppedBySignal
    from ..verbs.rehearse import rehearse

    try:
        verdict = rehearse(*get_overrides(options), options.ranks, options.micro_batches, print_to_stderr)
    except StoppedBySignal as stop:
        print_to_stderr(f"shoestring rehearse: {stop}")
        return stop.exit_code
    print_result(options, lambda: rehearsal_tables(verdict, options.passes), lambda: rehearsal_to_dict(verdict))
    return verdict.exit_code


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    """What a forecast takes and no run configures."""
    parser.add_argument("--comm-sms", type=int, metavar="N", help="SMs lent to the exchange (default: as measured)")
    parser.add_argument("--skew", type=float, metavar="X", help="rows of the fullest rank above the mean (default 0)")
    parser.add_argument("--jitter", type=float, metavar="X", help="spread of nodes' speed (default 0)")
    text = "of the memory that comes and goes, what is lost (default 0.1)"
    parser.add_argument("--fragmentation", type=float, metavar="X", help=text)


def _inputs(options: argparse.Namespace) -> dict[str, object]:
    """Those that were given, by field of the recipe."""
    named = {name: getattr(options, name) for name in ("comm_sms", "skew", "jitter", "fragmentation")}
    return {name: value for name, value in named.items() if value is not None}
