"""Programs as text: JSON for scripts, and a timeline in plain characters."""

from __future__ import annotations

import math

from .program import Instruction, MicroBatchWork, Program, in_flight
from .simulate import ProgramTimes


def to_json(program: Program) -> dict[str, object]:
    """The program as plain values. `stages` counts ranks, as on the command line."""
    return {
        "schedule": program.schedule,
        "stages": program.ranks,
        "micro_batches": program.micro_batches,
        "ranks": [[_instruction(instruction) for instruction in row] for row in program.instructions],
    }


def _instruction(instruction: Instruction) -> dict[str, object]:
    forward, backward = instruction.forward, instruction.backward
    if forward is not None and backward is not None:
        return {"op": instruction.op.value, "forward": _work(forward), "backward": _work(backward)}
    return {"op": instruction.op.value, **_work(instruction.works[0])}


def _work(work: MicroBatchWork) -> dict[str, object]:
    return {"chunk": work.chunk, "micro_batch": work.micro_batch}


def ascii_timeline(replay: ProgramTimes) -> str:
    """One line a rank, to scale: `F3---` is an instruction, dots are bubble.

    Small letters are chunk 1; with more than two chunks a rank, `F3a` is chunk 0, `F3b` chunk 1, and so on.
    """
    program = replay.program
    labels = [[_label(instruction, program.chunks) for instruction in row] for row in program.instructions]
    scale = _columns_a_unit(replay, labels)
    peaks = [max(alive) for alive in in_flight(program)]
    margin = len(f"rank {program.ranks - 1}")
    lines = [title(program)]
    for rank, row in enumerate(labels):
        line = ""
        for label, start, end in zip(row, replay.starts[rank], replay.ends[rank], strict=True):
            line = line.ljust(round(start * scale), ".")
            width = round(end * scale) - len(line)
            line += (label.ljust(width - 1, "-") + " ")[:width]
        line = line.ljust(round(replay.makespan * scale), ".")
        lines.append(f"{f'rank {rank}':{margin}} |{line}| bubble {replay.bubbles[rank]:g}, in flight {peaks[rank]}")
    lines.append(summary(replay))
    return "\n".join(lines)


def title(program: Program) -> str:
    """The schedule and its size."""
    ranks = "1 rank" if program.ranks == 1 else f"{program.ranks} ranks"
    chunks = f", {program.chunks} chunks a rank" if program.chunks > 1 else ""
    return f"{program.schedule}: {ranks}{chunks}, {program.micro_batches} micro-batches"


def summary(replay: ProgramTimes) -> str:
    """How long it takes and how much of that is bubble."""
    return f"makespan {replay.makespan:g}, bubble {100 * replay.bubble_fraction:.1f} % of the ranks' time"


def _label(instruction: Instruction, chunks: int) -> str:
    letters = instruction.op.value
    parts = []
    for letter, work in zip(letters, instruction.works, strict=True):
        letter = letter.lower() if chunks == 2 and work.chunk == 1 else letter
        suffix = chr(ord("a") + work.chunk) if chunks > 2 else ""
        parts.append(f"{letter}{work.micro_batch}{suffix}")
    return "".join(parts)


def _columns_a_unit(replay: ProgramTimes, labels: list[list[str]]) -> int:
    """Wide enough for each label and a space behind it."""
    return math.ceil(
        max(
            (len(label) + 1) / (end - start)
            for row, starts, ends in zip(labels, replay.starts, replay.ends, strict=True)
            for label, start, end in zip(row, starts, ends, strict=True)
        )
    )
