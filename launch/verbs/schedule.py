"""`shoestring schedule`: check and draw a pipeline program."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from ...comm.errors import Problem, raise_if_any
from ...parallelism.pipeline.check import verify_program
from ...parallelism.pipeline.program import Op, PipelineProgram, program_as_dict
from ...parallelism.pipeline.schedules.registry import build_program, schedule_problems
from ...parallelism.pipeline.simulate import OpDurations, simulate_program
from ..report.timeline import ascii_timeline, svg_timeline

_OPTIONS = {"schedule": "NAME", "ranks": "--pp", "micro_batches": "--micro-batches", "chunks": "--chunks"}


def draw_schedule(
    name: str,
    ranks: int,
    micro_batches: int,
    chunks: int | None = None,
    output_format: str = "ascii",
    durations: str = "",
) -> str:
    """Build and check a program; return it as `output_format`: ascii, svg or json.

    `durations` are units of time, such as `F=1,I=1.6,W=0.8,FB=2.6`; the default is 1, for B and FB the sum of their
    parts.
    """
    given: dict[Op, float] = {}
    sizes = schedule_problems(name, ranks, micro_batches, chunks)
    renamed = (replace(problem, field=_OPTIONS[problem.field]) for problem in sizes)
    raise_if_any((*renamed, *_parse_times(durations, given)))
    program = build_program(name, ranks, micro_batches, chunks)
    verify_program(program)
    if output_format == "json":
        return json.dumps(program_as_dict(program))
    unit_times = _unit_times(given)
    simulated = simulate_program(program, unit_times)
    if output_format == "ascii":
        return ascii_timeline(simulated)
    return svg_timeline(simulated, subtitle=_describe(unit_times, program))


def _unit_times(given: Mapping[Op, float]) -> OpDurations:
    return OpDurations(
        forward=given.get(Op.F, 1.0),
        input_gradient=given.get(Op.I, 1.0),
        weight_gradient=given.get(Op.W, 1.0),
        backward=given.get(Op.B),
        forward_backward=given.get(Op.FB),
    )


def _parse_times(text: str, given: dict[Op, float]) -> Iterator[Problem]:
    """Parse `text` into `given`; yield what is wrong."""
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        try:
            op, time = Op(name.strip()), float(value)
        except ValueError:
            yield Problem("--times", item, "write F, B, I, W or FB, an equals sign and a number, as in F=1,I=1.6,W=0.8")
            continue
        if not 0 < time < math.inf:
            yield Problem("--times", item, "a duration must be greater than 0")
        given[op] = time


def _describe(times: OpDurations, program: PipelineProgram) -> str:
    present = {instruction.op for row in program.instructions for instruction in row}
    return ", ".join(f"{op} = {times.duration_of_op(op):g}" for op in Op if op in present)
