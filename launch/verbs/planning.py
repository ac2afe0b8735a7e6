"""A run priced before it starts: `simulate` and `plan`, and `calibrate`, which measures what they reckon with."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import Verbs, add_format, described, with_overrides
from .show import show


def add(verbs: Verbs) -> None:
    """Add this family's verbs."""
    _add_simulate(verbs)
    _add_plan(verbs)
    _add_calibrate(verbs)


def _add_simulate(verbs: Verbs) -> None:
    simulate = with_overrides(verbs.add_parser("simulate", help="one layout priced and explained, before it runs"))
    simulate.add_argument("--trace", type=Path, metavar="FILE", help="write a timeline for Perfetto")
    simulate.add_argument("--html", type=Path, metavar="FILE", help="write a page with timeline and memory")
    add_format(simulate)
    _add_inputs(simulate)
    simulate.set_defaults(run=_simulate)


def _simulate(options: argparse.Namespace) -> int:
    from ..simulate import simulate, simulation_table, simulation_tree, write_files

    simulation = simulate(*described(options), _inputs(options))
    write_files(simulation, options.trace, options.html)
    show(options, lambda: simulation_table(simulation), lambda: simulation_tree(simulation))
    return 0


def _add_plan(verbs: Verbs) -> None:
    plan = with_overrides(verbs.add_parser("plan", help="layouts searched and priced against the budget"))
    plan.add_argument("--keep", type=int, default=5, metavar="N", help="layouts to print (default 5)")
    add_format(plan)
    plan.add_argument("--html", type=Path, metavar="FILE", help="write a page of the best layout, with its timeline")
    _add_inputs(plan)
    plan.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> int:
    from ..plan import plan, plan_table, plan_tree, write_page

    result = plan(*described(options), options.keep, _inputs(options))
    if options.html is not None:
        write_page(result, options.html)
    show(options, lambda: plan_table(result), lambda: plan_tree(result))
    return 0


def _add_calibrate(verbs: Verbs) -> None:
    text = "measure this machine's parts for the planner, as a cluster of its own"
    calibrate = with_overrides(verbs.add_parser("calibrate", help=text))
    folder = Path("runs/calibration")
    calibrate.add_argument("--output", type=Path, default=folder, metavar="DIR", help=f"default {folder}")
    calibrate.add_argument("--ranks", type=int, default=2, metavar="N", help="processes at work (default 2)")
    calibrate.add_argument("--repeats", type=int, default=20, metavar="N", help="of each measurement (default 20)")
    calibrate.set_defaults(run=_calibrate)


def _calibrate(options: argparse.Namespace) -> int:
    from ..calibrate import calibrate

    written = calibrate(*described(options), options.output, options.ranks, options.repeats)
    print(f"wrote {written}; price with it: --config-dir {options.output} cluster=measured")
    return 0


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
