"""`shoestring schedule`: check and draw a pipeline program."""

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from markupsafe import Markup

from ...comm.errors import Problem, raise_if_any
from ...parallelism.pipeline.check import verify_program
from ...parallelism.pipeline.program import Op, PipelineProgram, program_as_dict
from ...parallelism.pipeline.schedules.registry import build_program, schedule_problems
from ...parallelism.pipeline.simulate import OpDurations, simulate_program
from ..answers.blocks import Answer, Figure
from ..answers.options import add_answer_options, write_output, write_page
from ..console import print_or_raise
from ..report.timeline import ascii_timeline, program_title, svg_timeline

_OPTIONS = {"schedule": "NAME", "ranks": "--pp", "micro_batches": "--micro-batches", "chunks": "--chunks"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("name", metavar="NAME", help="gpipe, 1f1b, interleaved, zb_h1, dualpipe or dualpipev")
    parser.add_argument("--pp", type=int, required=True, metavar="P", help="number of pipeline ranks")
    text = "micro-batches per step and data-parallel rank"
    parser.add_argument("--micro-batches", type=int, required=True, metavar="N", help=text)
    parser.add_argument("--chunks", type=int, metavar="V", help="stages per rank, for interleaved (default 2)")
    text = "output format: a drawing as text (ascii, table) or SVG, or the instructions"
    add_answer_options(parser, ("ascii", "table", "svg", "json"), text)
    text = "durations to draw with (default 1; B and FB: the sum of their parts)"
    parser.add_argument("--times", default="", metavar="F=1,I=1,W=1,FB=3", help=text)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write to FILE instead of the terminal")


def run(options: argparse.Namespace) -> int:
    """Draw the program that the options describe."""
    answer = schedule_answer(options)
    (figure,) = (block for block in answer.sections[0].blocks if isinstance(block, Figure))
    write_page(options, answer)
    if options.format == "json":
        drawing = json.dumps(answer.data)
    else:
        drawing = figure.drawn if options.format == "svg" else figure.text
    if options.output is None:
        print_or_raise(drawing)
    else:
        write_output(options.output, f"{drawing}\n", "--output")
    return answer.exit_code


def schedule_answer(options: argparse.Namespace) -> Answer:
    """Build and check the program that the options describe; return it with its timeline. Raises `ConfigError`."""
    given: dict[Op, float] = {}
    size = options.name, options.pp, options.micro_batches, options.chunks
    renamed = (replace(problem, field=_OPTIONS[problem.field]) for problem in schedule_problems(*size))
    raise_if_any((*renamed, *_parse_times(options.times, given)))
    program = build_program(*size)
    verify_program(program)
    unit_times = _unit_times(given)
    simulated = simulate_program(program, unit_times)

    def picture() -> Markup:
        return svg_timeline(simulated, subtitle=_describe(unit_times, program))

    figure = Figure("", picture, is_wide=True, text=ascii_timeline(simulated))
    return Answer.from_blocks(program_title(program), program_as_dict(program), [figure])


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
