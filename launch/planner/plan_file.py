"""The planned figures of a run's layout, read from the JSON of `shoestring plan` or `shoestring simulate`."""

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
"""Facts of a plan that a run must share: with others its steps are different work."""
_LAYOUT = ("pp", "edp", "ep", "schedule", "micro_batch", "layers")


@dataclass(frozen=True)
class PlanEntry:
    """Planned figures of one layout. Times are means over ranks."""

    layout_name: str
    """Which layout of the plan this is, in words."""
    time_terms: Mapping[str, float]
    """Seconds per step, by the names of `trainer.ledger.terms.STEP_TIME_TERMS`."""
    step_seconds: float
    """Seconds per step, the sum of the terms."""
    tokens_per_second: float
    """Throughput of all GPUs together."""
    gpu_hours: float
    """GPU-hours of the whole pre-training, steps only."""
    memory_bytes: float
    """Bytes of the rank that needs most memory."""
    deviations: Sequence[str]
    """Differences between plan and run that leave the plan comparable, in words."""


def read_plan_entry(path: Path, config: RunConfig, precision: str | None) -> PlanEntry:
    """Read the planned figures of the layout of `config`; `precision` is that of the run's GEMMs, None if unknown.

    Among entries with the run's layout it takes the one whose recipe has most in common with the run, then the
    fastest. Raises `ConfigError` for a file that is not a plan, and for a plan of another model, sequence length,
    batch or layout.
    """
    tree = _read(path)
    wanted = _layout_of(config)
    try:
        raise_if_any(_other_run(path, tree["of"], _facts(config)))
        rows = dict(_rows(tree))
        same = {name: row for name, row in rows.items() if all(row[key] == wanted[key] for key in _LAYOUT)}
        if not same:
            raise ConfigError([_no_such_layout(path, rows, wanted)])
        # A plan may list one layout several times with other precision or recompute. `min` keeps the first of equals,
        # and the file lists the fastest first.
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
    return Problem(_OPTION, str(path), f"is not a plan of this version of Shoestring; write one with {command}")


def _rows(tree: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (name, layout) of every layout of the file, the fastest first."""
    if "layouts" not in tree:
        yield "the simulated layout", tree["layout"]
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
    """Return the run's facts as JSON gives them back: tuples are lists, for example."""
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
    """Yield a problem per fact in which the plan is not for this run."""
    for key in _SAME:
        both = (planned[key], run[key])
        pairs = (
            [(f".{name}", *(side.get(name) for side in both)) for name in both[1]] if key == "model" else [("", *both)]
        )
        for name, theirs, ours in pairs:
            if theirs != ours:
                hint = f"is a plan for {key}{name}={theirs!r}, but the run has {ours!r}; make a plan for this run"
                yield Problem(_OPTION, str(path), hint)


def _no_such_layout(path: Path, rows: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, Any]) -> Problem:
    listed = list(dict.fromkeys(map(_words, rows.values())))
    hint = f"does not contain the run's layout, {_words(wanted)}; it contains {'; '.join(listed) or 'none'}"
    return Problem(_OPTION, str(path), f"{hint}. Forecast the run's layout with `shoestring simulate`")


def _words(row: Mapping[str, Any]) -> str:
    grid = f"pp{row['pp']} edp{row['edp']} ep{row['ep']}"
    return f"{grid} {row['schedule']} micro-batch {row['micro_batch']} layers {'+'.join(map(str, row['layers']))}"


def _other_facts(planned: Mapping[str, Any], config: RunConfig) -> Iterator[str]:
    """Yield differences that change a run's cost but not its steps."""
    for key, ours in _facts(config).items():
        if key not in _SAME and planned[key] != ours:
            yield f"{key}: {_word(planned[key])} planned, {_word(ours)} run"


def _other_recipe(row: Mapping[str, Any], config: RunConfig, precision: str | None) -> Iterator[str]:
    """Yield differences that change the time of a step."""
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
