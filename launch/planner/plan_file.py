"""What a plan says of the layout that a run has: read from the JSON of `shoestring plan` or `shoestring simulate`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...comm.errors import ConfigError, Problem, raise_if_any
from ...comm.files.file_io import read_json
from ...comm.files.strict_json import JsonValue, MalformedFileError
from ...trainer.build import build_stage_layout
from ...trainer.config import RunConfig
from ...trainer.ledger.terms import STEP_TIME_TERMS
from ..verbs.simulate import run_description
from .config_adapter import configured_recipe

_OPTION = "--against"
_MOST_BYTES = 2**28
_SAME = ("model", "sequence_length", "global_batch_size")
"""Of a plan's facts, those that a run must share: without them its prices are of something else."""
_LAYOUT = ("pp", "edp", "ep", "schedule", "micro_batch", "layers")


@dataclass(frozen=True)
class PlanEntry:
    """The price of one layout. Times are means over ranks."""

    layout_name: str
    """Which layout of the plan it is."""
    time_terms: Mapping[str, float]
    """Seconds a step, by the names of `trainer.ledger.terms.STEP_TIME_TERMS`."""
    step_seconds: float
    """Their sum."""
    tokens_per_second: float
    """Of all GPUs together."""
    gpu_hours: float
    """Of pre-training to its end, steps alone."""
    memory_bytes: float
    """Of the fullest rank."""
    deviations: Sequence[str]
    """Where the run is not what was planned, although its steps are."""


def read_plan_entry(path: Path, config: RunConfig, precision: str | None) -> PlanEntry:
    """What the plan at `path` says of a run with this configuration, whose GEMMs are in `precision`, if that is known.

    Of several layouts it is the one of the run; where several differ from each other in their recipe alone, the one
    with most in common with the run, and of these the fastest. Raises `ConfigError` for a file that is no plan, and a
    plan of another model, sequence length, batch or layout.
    """
    tree = _read(path)
    wanted = _layout_of(config)
    try:
        raise_if_any(_other_run(path, tree["of"], _facts(config)))
        rows = dict(_rows(tree))
        same = {name: row for name, row in rows.items() if all(row[key] == wanted[key] for key in _LAYOUT)}
        if not same:
            raise ConfigError([_no_such_layout(path, rows, wanted)])
        name = min(same, key=lambda name: len(list(_other_recipe(same[name], config, precision))))
        return _planned(
            name, same[name], [*_other_facts(tree["of"], config), *_other_recipe(same[name], config, precision)]
        )
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ConfigError([_no_plan(path)]) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, _MOST_BYTES).as_mapping()
    except OSError as error:
        raise ConfigError([Problem(_OPTION, str(path), f"cannot be read: {error.strerror}")]) from error
    except MalformedFileError as error:
        raise ConfigError([_no_plan(path)]) from error


def _no_plan(path: Path) -> Problem:
    command = "`shoestring plan … --format json > FILE`, or with simulate"
    return Problem(_OPTION, str(path), f"is no plan of this version of Shoestring; write one with {command}")


def _rows(tree: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every layout of the file by a name for it, the fastest first."""
    if "layouts" not in tree:
        yield "the layout that was simulated", tree["layout"]
        return
    count = len(tree["layouts"])
    for place, row in enumerate(tree["layouts"], 1):
        yield f"layout {place} of {count}", row
    yield "the configured layout", tree["configured"]


def _planned(name: str, row: Mapping[str, Any], deviations: Sequence[str]) -> PlanEntry:
    return PlanEntry(
        layout_name=name,
        time_terms={term: JsonValue(row["terms"][term]).as_number() for term in STEP_TIME_TERMS},
        step_seconds=JsonValue(row["step_seconds"]).as_number(0),
        tokens_per_second=JsonValue(row["tokens_per_second_and_gpu"]).as_number(0) * row["pp"] * row["edp"] * row["ep"],
        gpu_hours=JsonValue(row["gpu_hours"]).as_number(0),
        memory_bytes=JsonValue(row["memory_bytes"]).as_number(0),
        deviations=deviations,
    )


def _facts(config: RunConfig) -> dict[str, Any]:
    """As they are after a way through JSON."""
    facts: dict[str, Any] = json.loads(json.dumps(run_description(config)))
    return facts


def _layout_of(config: RunConfig) -> dict[str, Any]:
    topology, schedule = config.topology, config.schedule
    return {
        "pp": topology.pp,
        "edp": topology.edp,
        "ep": topology.ep,
        "schedule": schedule.name,
        "micro_batch": schedule.micro_batch_size,
        "layers": [len(layers) for layers in build_stage_layout(config).stage_layers],
    }


def _other_run(path: Path, planned: Mapping[str, Any], run: Mapping[str, Any]) -> Iterator[Problem]:
    """Where the plan is not of this run."""
    for key in _SAME:
        both = (planned[key], run[key])
        pairs = (
            [(f".{name}", *(side.get(name) for side in both)) for name in both[1]] if key == "model" else [("", *both)]
        )
        for name, theirs, ours in pairs:
            if theirs != ours:
                hint = f"is a plan for {key}{name} = {theirs!r}, and the run has {ours!r}; plan for the run's"
                yield Problem(_OPTION, str(path), hint)


def _no_such_layout(path: Path, rows: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, Any]) -> Problem:
    there = list(dict.fromkeys(map(_words, rows.values())))
    hint = f"has no layout like the run's, {_words(wanted)}; it has {'; '.join(there) or 'none at all'}"
    return Problem(_OPTION, str(path), f"{hint}. Price the run's own with shoestring simulate")


def _words(row: Mapping[str, Any]) -> str:
    grid = f"pp{row['pp']} edp{row['edp']} ep{row['ep']}"
    return f"{grid} {row['schedule']} micro-batch {row['micro_batch']} layers {'+'.join(map(str, row['layers']))}"


def _other_facts(planned: Mapping[str, Any], config: RunConfig) -> Iterator[str]:
    """What changes the cost of a run and not its steps, or is only named."""
    for key, ours in _facts(config).items():
        if key not in _SAME and planned[key] != ours:
            yield f"{key}: {_word(planned[key])} planned, {_word(ours)} run"


def _other_recipe(row: Mapping[str, Any], config: RunConfig, precision: str | None) -> Iterator[str]:
    """What changes the time of a step."""
    if precision is not None and row["precision"] != precision:
        yield f"precision: {row['precision']} planned, {precision} run"
    run = configured_recipe(config)
    planned, parts = _parts(row["recompute"]), _parts(sorted(run.recompute))
    if planned != parts:
        yield f"recompute: {planned} planned, {parts} run"
    ours = {"exchange": run.exchange_name, "overlap": run.overlap, "moment_bytes": run.moment_bytes}
    for key, value in ours.items():
        if row[key] != value and (key != "exchange" or row["ep"] > 1):
            yield f"{key}: {row[key]} planned, {value} run"


def _parts(names: Sequence[str]) -> str:
    return "+".join(names) or "nothing"


def _word(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
