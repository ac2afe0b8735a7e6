"""Programs as text: JSON for scripts, and a timeline in ASCII."""

from __future__ import annotations

import math

from .program import ChunkMicroBatch, Instruction, PipelineProgram, count_in_flight
from .simulate import SimulatedTimes


def program_to_json(program: PipelineProgram) -> dict[str, object]:
    """Return the program as plain values. `pp` is the number of pipeline ranks."""
    return {
        "schedule": program.schedule,
        "pp": program.ranks,
        "micro_batches": program.num_micro_batches,
        "ranks": [[_instruction(instruction) for instruction in row] for row in program.instructions],
    }


def _instruction(instruction: Instruction) -> dict[str, object]:
    forward, backward = instruction.forward, instruction.backward
    if forward is not None and backward is not None:
        return {"op": instruction.op.value, "forward": _work(forward), "backward": _work(backward)}
    return {"op": instruction.op.value, **_work(instruction.chunk_micro_batches[0])}


def _work(work: ChunkMicroBatch) -> dict[str, object]:
    return {"chunk": work.chunk, "micro_batch": work.micro_batch}


def draw_ascii_timeline(times: SimulatedTimes) -> str:
    """Return one line per rank, to scale: `F3---` is an instruction, dots are bubble.

    Lower-case letters are chunk 1; with more than two chunks per rank, `F3a` is chunk 0, `F3b` chunk 1, and so on.
    """
    program = times.program
    labels = [[_label(instruction, program.chunks_per_rank) for instruction in row] for row in program.instructions]
    scale = _columns_per_time_unit(times, labels)
    peaks = [max(alive) for alive in count_in_flight(program)]
    margin = len(f"rank {program.ranks - 1}")
    lines = [program_title(program)]
    for rank, row in enumerate(labels):
        line = ""
        for label, start, end in zip(row, times.start_times[rank], times.end_times[rank], strict=True):
            # Rounded from the start of the line each time: rounding every width would shift later instructions.
            line = line.ljust(round(start * scale), ".")
            width = round(end * scale) - len(line)
            line += (label.ljust(width - 1, "-") + " ")[:width]
        line = line.ljust(round(times.makespan * scale), ".")
        lines.append(
            f"{f'rank {rank}':{margin}} |{line}| bubble {times.bubble_time_per_rank[rank]:g}, in flight {peaks[rank]}"
        )
    lines.append(bubble_summary(times))
    return "\n".join(lines)


def program_title(program: PipelineProgram) -> str:
    """Return the schedule's name and size."""
    ranks = "1 rank" if program.ranks == 1 else f"{program.ranks} ranks"
    chunks = f", {program.chunks_per_rank} chunks per rank" if program.chunks_per_rank > 1 else ""
    return f"{program.schedule}: {ranks}{chunks}, {program.num_micro_batches} micro-batches"


def bubble_summary(times: SimulatedTimes) -> str:
    """Return the makespan and the share of bubble."""
    return f"makespan {times.makespan:g}, bubble {100 * times.bubble_fraction:.1f} % of the ranks' time"


def _label(instruction: Instruction, chunks: int) -> str:
    letters = instruction.op.value
    parts = []
    for letter, work in zip(letters, instruction.chunk_micro_batches, strict=True):
        letter = letter.lower() if chunks == 2 and work.chunk == 1 else letter
        suffix = chr(ord("a") + work.chunk) if chunks > 2 else ""
        parts.append(f"{letter}{work.micro_batch}{suffix}")
    return "".join(parts)


def _columns_per_time_unit(times: SimulatedTimes, labels: list[list[str]]) -> int:
    """Return the smallest scale at which every instruction has room for its label and a space."""
    return math.ceil(
        max(
            (len(label) + 1) / (end - start)
            for row, starts, ends in zip(labels, times.start_times, times.end_times, strict=True)
            for label, start, end in zip(row, starts, ends, strict=True)
        )
    )
