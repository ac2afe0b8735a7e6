"""A model on paper: `params` and `memory`; its pipeline: `schedule` and `partition`."""

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
        verbs.add_parser("params", help="parameters, FLOPs a token and activations of a model")
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
    memory = add_override_arguments(verbs.add_parser("memory", help="bytes that each rank of a run needs, by kind"))
    memory.add_argument("--measure", action="store_true", help="run two steps of the real ranks here, and compare")
    memory.add_argument("--one-rank", action="store_true", help="with all tokens of a group on one rank's experts")
    add_format_option(memory)
    memory.set_defaults(run=_memory)


def _memory(options: argparse.Namespace) -> int:
    from ..verbs.memory import build_memory_report, memory_as_dict, memory_table

    if options.one_rank and not options.measure:
        raise ConfigError([Problem("--one-rank", True, "is how a run is measured; write --measure too")])
    report = build_memory_report(
        *get_overrides(options), measure=options.measure, all_tokens_to_one_rank=options.one_rank
    )
    print_result(options, lambda: memory_table(report), lambda: memory_as_dict(report))
    return 0


def _add_schedule(verbs: Subparsers) -> None:
    schedule = verbs.add_parser("schedule", help="a pipeline program, checked and drawn")
    schedule.add_argument("name", metavar="NAME", help="gpipe, 1f1b, interleaved, zb_h1, dualpipe or dualpipev")
    schedule.add_argument("--pp", type=int, required=True, metavar="P", help="pipeline ranks")
    schedule.add_argument("--micro-batches", type=int, required=True, metavar="N", help="of one global batch")
    schedule.add_argument("--chunks", type=int, metavar="V", help="stages a rank holds, for interleaved (default 2)")
    schedule.add_argument("--format", choices=["ascii", "svg", "json"], default="ascii")
    schedule.add_argument("--times", default="", metavar="F=1,I=1,W=1,FB=3", help="durations of a chunk, to draw with")
    schedule.add_argument("--output", type=Path, metavar="FILE", help="write there instead of to the terminal")
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
        verbs.add_parser("partition", help="a model's layers on the stages of a pipeline")
    )
    partition.add_argument("--stages", type=int, required=True, help="stages the model is cut into")
    partition.add_argument(
        "--layers-per-stage", metavar="L,L,…", help="the number of layers of each stage, instead of a search"
    )
    partition.add_argument("--schedule", default="1f1b", help="puts stages on ranks (default 1f1b)")
    add_format_option(partition)
    partition.set_defaults(run=_partition)


def _partition(options: argparse.Namespace) -> int:
    from ..verbs.partition import partition_as_dict, partition_model, partition_table

    model = partition_model(*get_overrides(options), options.stages, options.schedule, options.layers_per_stage)
    print_result(options, lambda: partition_table(model), lambda: partition_as_dict(model))
    return 0
