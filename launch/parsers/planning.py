"""Verbs before a run starts: `simulate`, `plan`, `calibrate` and `rehearse`."""

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
        verbs.add_parser("simulate", help="forecast step time, memory and cost of one layout")
    )
    simulate.add_argument("--trace", type=Path, metavar="FILE", help="write the simulated timeline for Perfetto")
    simulate.add_argument("--html", type=Path, metavar="FILE", help="write an HTML page with timeline and memory")
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
    plan = add_override_arguments(
        verbs.add_parser("plan", help="search the fastest layouts, with their cost against the budget")
    )
    plan.add_argument("--keep", type=int, default=5, metavar="N", help="number of layouts to print (default 5)")
    add_format_option(plan)
    plan.add_argument(
        "--html", type=Path, metavar="FILE", help="write an HTML page of the best layout, with its timeline"
    )
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
    text = "measure this machine for the planner, and write it as a cluster"
    calibrate = add_override_arguments(verbs.add_parser("calibrate", help=text))
    folder = Path("runs/calibration")
    calibrate.add_argument(
        "--output", type=Path, default=folder, metavar="DIR", help=f"output directory (default {folder})"
    )
    calibrate.add_argument("--ranks", type=int, default=2, metavar="N", help="number of processes (default 2)")
    calibrate.add_argument(
        "--repeats", type=int, default=20, metavar="N", help="repetitions of each measurement (default 20)"
    )
    calibrate.set_defaults(run=_calibrate)


def _calibrate(options: argparse.Namespace) -> int:
    from ..console import print_to_stdout
    from ..verbs.calibrate import calibrate

    written = calibrate(*get_overrides(options), options.output, options.ranks, options.repeats)
    print_to_stdout(f"Wrote {written}. Use it with: --config-dir {options.output} cluster=measured")
    return 0


def _add_rehearse(verbs: Subparsers) -> None:
    text = "run one step of a GPU run's real code on fake CUDA tensors; needs no GPU and no data"
    rehearse = add_override_arguments(verbs.add_parser("rehearse", help=text))
    ranks = rehearse.add_mutually_exclusive_group()
    ranks.add_argument("--ranks", metavar="R,R,…", help="ranks to rehearse, such as 0,7,901")
    text = "one rank per pipeline rank, and a second member of one ep group and of one edp group (the default)"
    ranks.add_argument("--representative", action="store_true", help=text)
    text = "micro-batches per rank in the step (default: those of the run's first step)"
    rehearse.add_argument("--micro-batches", type=int, metavar="N", help=text)
    text = "list the N operations of an MoE layer that move the most bytes (default 0)"
    rehearse.add_argument("--top-operations", type=int, default=0, metavar="N", help=text)
    add_format_option(rehearse)
    rehearse.set_defaults(run=_rehearse)


def _rehearse(options: argparse.Namespace) -> int:
    from ..console import print_to_stderr

    if options.top_operations < 0:
        raise ConfigError([Problem("--top-operations", options.top_operations, "must be at least 0")])
    print_to_stderr("reading the configuration")  # before torch is loaded, which takes seconds
    from ..rehearsal.tables import rehearsal_tables, rehearsal_to_dict
    from ..run.launcher import StoppedBySignal
    from ..verbs.rehearse import rehearse

    try:
        result = rehearse(*get_overrides(options), options.ranks, options.micro_batches, print_to_stderr)
    except StoppedBySignal as stop:
        print_to_stderr(f"shoestring rehearse: {stop}")
        return stop.exit_code
    print_result(options, lambda: rehearsal_tables(result, options.top_operations), lambda: rehearsal_to_dict(result))
    return result.exit_code


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    """Add the options for forecast inputs that no configuration has."""
    parser.add_argument(
        "--comm-sms", type=int, metavar="N", help="SMs reserved for communication (default: as measured)"
    )
    parser.add_argument(
        "--skew", type=float, metavar="X", help="expert load of the most loaded rank over the mean, minus 1 (default 0)"
    )
    parser.add_argument(
        "--jitter", type=float, metavar="X", help="standard deviation of node speed, as a fraction (default 0)"
    )
    text = "fraction of memory lost to fragmentation, of what is allocated within a step (default 0.1)"
    parser.add_argument("--fragmentation", type=float, metavar="X", help=text)


def _inputs(options: argparse.Namespace) -> dict[str, object]:
    """Return the inputs that were given, by recipe field."""
    named = {name: getattr(options, name) for name in ("comm_sms", "skew", "jitter", "fragmentation")}
    return {name: value for name, value in named.items() if value is not None}
