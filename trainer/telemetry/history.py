"""Reading `metrics.jsonl` back as the history that the weights have lived through."""

from __future__ import annotations

import json
from pathlib import Path

from ...comm.refusal import Problem, Refused
from .events import Event
from .lines import whole_lines

_MEASURED = frozenset({"step", "evaluation", "sample", "checkpoint"})


def read_metrics(path: Path) -> list[Event]:
    """The retained history of the run whose `metrics.jsonl` is at `path`, in order.

    After a resume from step r, what an earlier life measured after r never happened to these weights and is dropped; of
    two measurements of one kind at one step the later counts. Events about the run itself (run, resume, stop, budget,
    warning) are all kept. A last line still being written is left out. Raises Refused for a missing file or a broken
    line.
    """
    kept: list[Event] = []
    for event in read_all_metrics(path):
        if event.kind == "resume":
            kept = [old for old in kept if old.kind not in _MEASURED or old.step <= event.step]
        kept.append(event)
    last = {(event.kind, event.step): index for index, event in enumerate(kept)}
    return [
        event
        for index, event in enumerate(kept)
        if event.kind not in _MEASURED or last[(event.kind, event.step)] == index
    ]


def read_all_metrics(path: Path) -> list[Event]:
    """Every event in the file at `path`, lives that were rolled back included. Raises Refused like `read_metrics`."""
    if not path.is_file():
        raise Refused([Problem(str(path), None, "no such file; name the metrics.jsonl of a run")])
    return [_event(path, number, line) for number, line in whole_lines(path)]


def _event(path: Path, number: int, line: str) -> Event:
    try:
        values = json.loads(line)
        return Event(kind=values.pop("kind"), step=values.pop("step"), time=values.pop("time"), values=values)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise Refused([Problem(f"{path}:{number}", line[:80], "not an event; restore or delete this line")]) from error
