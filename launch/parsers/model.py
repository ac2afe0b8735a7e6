"""A model on paper: `params` and `memory`; its pipeline: `schedule` and `partition`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...comm.errors import ConfigError, Problem
from .options import Verbs, add_format, described, show, with_overrides


def add(verbs: Verbs) -> None:
    """Add this family's verbs."""
    _add_params(verbs)
    _add_memory(verbs)
    _add_schedule(verbs)
    _add_partition(verbs)


def _add_params(verbs: Verbs) -> None:
    params = with_overrides(verbs.add_parser("params", help="parameters, FLOPs a token and activations of a model"))
    add_format(params)
    params.set_defaults(run=_params)


def _params(options: argparse.Namespace) -> int:
    from ..verbs.params import params_table, params_tree

    show(options, lambda: params_table(*described(options)), lambda: params_tree(*described(options)))
    return 0


def _add_memory(verbs: Verbs) -> None:
    memory = with_overrides(verbs.add_parser("memory", help="bytes that each rank of a run needs, by kind"))
    memory.add_argument("--measure", action="store_true", help="run two steps of the real ranks here, and compare")
    memory.add_argument("--one-rank", action="store_true", help="with all tokens of a group on one rank's experts")
    add_format(memory)
    memory.set_defaults(run=_memory)


def _memory(options: argparse.Namespace) -> int:
    from ..verbs.memory import memory_report, memory_table, memory_tree

    if options.one_rank and not options.measure:
        raise ConfigError([Problem("--one-rank", True, "is how a run is measured; write --measure too")])
    report = memory_report(*described(options), measure=options.measure, one_rank=options.one_rank)
    show(options, lambda: memory_table(report), lambda: memory_tree(report))
    return 0


def _add_schedule(verbs: Verbs) -> None:
    schedule = verbs.add_parser("schedule", help="a pipeline program, checked and drawn")
    schedule.add_argument("name", metavar="NAME", help="gpipe, one_f_one_b, interleaved, zb1p, dualpipe or dualpipev")
    schedule.add_argument("--stages", type=int, required=True, metavar="P", help="pipeline ranks")
    schedule.add_argument("--micro-batches", type=int, required=True, metavar="N", help="of one global batch")
    schedule.add_argument("--chunks", type=int, metavar="V", help="stages a rank holds, for interleaved (default 2)")
    schedule.add_argument("--format", choices=["ascii", "svg", "json"], default="ascii")
    schedule.add_argument("--times", default="", metavar="F=1,I=1,W=1,FB=3", help="durations of a chunk, to draw with")
    schedule.add_argument("--output", type=Path, metavar="FILE", help="write there instead of to the terminal")
    schedule.set_defaults(run=_schedule)


def _schedule(options: argparse.Namespace) -> int:
    from ..say import give
    from ..verbs.schedule import draw_schedule

    size = options.name, options.stages, options.micro_batches, options.chunks
    drawing = draw_schedule(*size, options.format, options.times)
    if options.output is None:
        give(drawing)
        return 0
    try:
        options.output.write_text(f"{drawing}\n")
    except OSError as error:
        raise ConfigError([Problem("--output", str(options.output), f"cannot be written: {error.strerror}")]) from None
    return 0


def _add_partition(verbs: Verbs) -> None:
    partition = with_overrides(verbs.add_parser("partition", help="a model's layers on the stages of a pipeline"))
    partition.add_argument("--stages", type=int, required=True, help="stages the model is cut into")
    partition.add_argument("--layout", metavar="L,L,…", help="the number of layers of each stage, instead of a search")
    partition.add_argument("--schedule", default="one_f_one_b", help="puts stages on ranks (default one_f_one_b)")
    add_format(partition)
    partition.set_defaults(run=_partition)


def _partition(options: argparse.Namespace) -> int:
    from ..verbs.partition import partition_model, partition_table, partition_tree

    model = partition_model(*described(options), options.stages, options.schedule, options.layout)
    show(options, lambda: partition_table(model), lambda: partition_tree(model))
    return 0
