"""Verbs about a model (`params`, `memory`) and its pipeline (`schedule`, `partition`)."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...comm.errors import ConfigError, Problem
from .options import Subparsers, add_format_option, add_override_arguments, get_overrides, print_result


def add_commands(verbs: Subparsers) -> None:
    """Add this family's verbs."""
    _add_params(verbs)
    _add_memory(verbs)
    _add_schedule(verbs)
    _add_partition(verbs)


def _add_params(verbs: Subparsers) -> None:
    params = add_override_arguments(
        verbs.add_parser("params", help="parameters, FLOPs per token and activations of a model")
    )
    add_format_option(params)
    params.set_defaults(run=_params)


def _params(options: argparse.Namespace) -> int:
    from ..verbs.params import params_as_dict, params_table

    print_result(
        options, lambda: params_table(*get_overrides(options)), lambda: params_as_dict(*get_overrides(options))
    )
    return 0


def _add_memory(verbs: Subparsers) -> None:
    memory = add_override_arguments(verbs.add_parser("memory", help="memory of each rank of a run, by kind"))
    memory.add_argument(
        "--measure", action="store_true", help="run two steps of all ranks on this machine, and compare"
    )
    memory.add_argument(
        "--one-rank",
        action="store_true",
        help="with --measure: route all tokens of each expert-parallel group to one rank",
    )
    add_format_option(memory)
    memory.set_defaults(run=_memory)


def _memory(options: argparse.Namespace) -> int:
    from ..verbs.memory import build_memory_report, memory_as_dict, memory_table

    if options.one_rank and not options.measure:
        raise ConfigError([Problem("--one-rank", True, "needs --measure too")])
    report = build_memory_report(
        *get_overrides(options), measure=options.measure, all_tokens_to_one_rank=options.one_rank
    )
    print_result(options, lambda: memory_table(report), lambda: memory_as_dict(report))
    return 0


def _add_schedule(verbs: Subparsers) -> None:
    schedule = verbs.add_parser("schedule", help="check and draw a pipeline program")
    schedule.add_argument("name", metavar="NAME", help="gpipe, 1f1b, interleaved, zb_h1, dualpipe or dualpipev")
    schedule.add_argument("--pp", type=int, required=True, metavar="P", help="number of pipeline ranks")
    schedule.add_argument(
        "--micro-batches", type=int, required=True, metavar="N", help="micro-batches per step and data-parallel rank"
    )
    schedule.add_argument("--chunks", type=int, metavar="V", help="stages per rank, for interleaved (default 2)")
    schedule.add_argument("--format", choices=["ascii", "svg", "json"], default="ascii")
    schedule.add_argument(
        "--times",
        default="",
        metavar="F=1,I=1,W=1,FB=3",
        help="durations to draw with (default 1; B and FB: the sum of their parts)",
    )
    schedule.add_argument("--output", type=Path, metavar="FILE", help="write to FILE instead of the terminal")
    schedule.set_defaults(run=_schedule)


def _schedule(options: argparse.Namespace) -> int:
    from ..console import print_or_raise
    from ..verbs.schedule import draw_schedule

    size = options.name, options.pp, options.micro_batches, options.chunks
    drawing = draw_schedule(*size, options.format, options.times)
    if options.output is None:
        print_or_raise(drawing)
        return 0
    try:
        options.output.write_text(f"{drawing}\n")
    except OSError as error:
        raise ConfigError([Problem("--output", str(options.output), f"cannot be written: {error.strerror}")]) from None
    return 0


def _add_partition(verbs: Subparsers) -> None:
    partition = add_override_arguments(
        verbs.add_parser("partition", help="layers, parameters and FLOPs of each pipeline stage")
    )
    partition.add_argument("--stages", type=int, required=True, metavar="N", help="number of pipeline stages")
    partition.add_argument(
        "--layers-per-stage", metavar="L,L,…", help="number of layers of each stage (default: balanced by FLOPs)"
    )
    partition.add_argument(
        "--schedule", default="1f1b", metavar="NAME", help="schedule that places stages on ranks (default 1f1b)"
    )
    add_format_option(partition)
    partition.set_defaults(run=_partition)


def _partition(options: argparse.Namespace) -> int:
    from ..verbs.partition import partition_as_dict, partition_model, partition_table

    model = partition_model(*get_overrides(options), options.stages, options.schedule, options.layers_per_stage)
    print_result(options, lambda: partition_table(model), lambda: partition_as_dict(model))
    return 0
