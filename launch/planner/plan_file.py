"""The planned figures of a run's layout, read from the JSON of `shoestring plan` or `shoestring simulate`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import __version__
from ...comm.errors import ConfigError, Problem, raise_if_any
from ...comm.files.file_io import read_json
from ...comm.files.strict_json import JsonValue, MalformedFileError, shorten_for_message
from ...trainer.build import build_stage_layout
from ...trainer.config import RunConfig
from ...trainer.ledger.terms import STEP_TIME_TERMS
from ..verbs.simulate import PLAN_FORMAT, run_description
from .config_adapter import configured_recipe

_OPTION = "--against"
_COMMAND = "write one with `shoestring plan … --format json > FILE`, or with simulate"
_MAX_BYTES = 2**28
_MAX_COUNT = 2**31
_MAX_NUMBER = 1e30
"""Limits of a plan's numbers: more than any run has, and products of them do not overflow."""
_SAME = ("model", "sequence_length", "global_batch_size")
"""Values of a plan that a run must share: with others its steps are different work."""
_PRICE = ("rampup_start_batch_size", "rampup_batch_size_increment", "rampup_tokens", "tokens", "cluster")
"""Values of a plan that change a run's price but not its steps."""
_LAYOUT = ("pp", "edp", "ep", "schedule", "micro_batch", "layers_per_stage")


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
    raise_if_any(_other_run(path, tree["run"], _run_description(config)))
    rows = dict(_rows(tree))
    same = {name: row for name, row in rows.items() if all(row[key] == wanted[key] for key in _LAYOUT)}
    if not same:
        raise ConfigError([_no_such_layout(path, rows, wanted)])
    # A plan may list one layout several times with other precision or recompute. `min` keeps the first of equals,
    # and the file lists the fastest first.
    name = min(same, key=lambda name: len(list(_other_recipe(same[name], config, precision))))
    row = same[name]
    return _planned(name, row, [*_other_price(tree["run"], config), *_other_recipe(row, config, precision)])


def _read(path: Path) -> dict[str, Any]:
    """Read the file. Raises `ConfigError` unless it is a plan of this format with all keys that are read here."""
    try:
        tree = read_json(path, _MAX_BYTES)
        tree.as_mapping()
        found = tree.get("format")
        if found is None or found.value != PLAN_FORMAT:
            raise ConfigError([_other_format(path, tree)])
        _check_keys(tree)
        return tree.as_mapping()
    except OSError as error:
        raise ConfigError([Problem(_OPTION, str(path), f"cannot be read: {error.strerror}")]) from error
    except MalformedFileError as error:
        reason = f"{error.location} {error.hint}".lstrip()
        raise ConfigError([Problem(_OPTION, str(path), f"is not a plan: {reason}; {_COMMAND}")]) from error


def _other_format(path: Path, tree: JsonValue) -> Problem:
    found, version = tree.get("format"), tree.get("version")
    if found is None and "layout" not in tree and "layouts" not in tree:
        return Problem(_OPTION, str(path), f"is not a plan; {_COMMAND}")
    number = 1 if found is None else shorten_for_message(found.value)
    by = f"Shoestring {shorten_for_message(version.value)}" if version is not None else "Shoestring 0.1 or earlier"
    hint = f"is a plan of format {number}, written by {by}; Shoestring {__version__} reads format {PLAN_FORMAT}"
    return Problem(_OPTION, str(path), f"{hint}; {_COMMAND}")


def _check_keys(tree: JsonValue) -> None:
    """Raise `MalformedFileError` for a missing key or a value of another type, among those that are read here."""
    run = tree["run"]
    run["model"].as_mapping()
    for key in (*_SAME, *_PRICE):
        run[key]  # raises if it is missing
    rows = [*tree["layouts"].as_list(), tree["configured"]] if "layouts" in tree else [tree["layout"]]
    for row in rows:
        for key in ("pp", "edp", "ep", "micro_batch", "moment_bytes"):
            row[key].as_integer(1, _MAX_COUNT)
        for key in ("schedule", "precision", "exchange"):
            row[key].as_string()
        for layers in row["layers_per_stage"].as_list():
            layers.as_integer(0, _MAX_COUNT)
        for part in row["recompute"].as_list():
            part.as_string()
        row["overlap"].as_boolean()
        for key in ("step_seconds", "tokens_per_second_per_gpu", "gpu_hours", "memory_bytes"):
            row[key].as_number(0, _MAX_NUMBER)
        for term in STEP_TIME_TERMS:
            row["time_terms"][term].as_number(-_MAX_NUMBER, _MAX_NUMBER)


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
        time_terms={term: float(row["time_terms"][term]) for term in STEP_TIME_TERMS},
        step_seconds=float(row["step_seconds"]),
        tokens_per_second=float(row["tokens_per_second_per_gpu"]) * row["pp"] * row["edp"] * row["ep"],
        gpu_hours=float(row["gpu_hours"]),
        memory_bytes=float(row["memory_bytes"]),
        deviations=deviations,
    )


def _run_description(config: RunConfig) -> dict[str, Any]:
    """Return `run_description` as JSON gives it back: tuples are lists, for example."""
    description: dict[str, Any] = json.loads(json.dumps(run_description(config)))
    return description


def _layout_of(config: RunConfig) -> dict[str, Any]:
    topology, schedule = config.topology, config.schedule
    return {
        "pp": topology.pp,
        "edp": topology.edp,
        "ep": topology.ep,
        "schedule": schedule.name,
        "micro_batch": schedule.micro_batch_size,
        "layers_per_stage": [len(layers) for layers in build_stage_layout(config).stage_layers],
    }


def _other_run(path: Path, planned: Mapping[str, Any], run: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield a problem per value in which the plan is not for this run."""
    for key in _SAME:
        both = (planned[key], run[key])
        pairs = (
            [(f".{name}", *(side.get(name) for side in both)) for name in both[1]] if key == "model" else [("", *both)]
        )
        for name, theirs, ours in pairs:
            if theirs != ours:
                plan = f"is a plan for {key}{name}={shorten_for_message(theirs)!r}"
                yield Problem(_OPTION, str(path), f"{plan}, but the run has {ours!r}; make a plan for this run")


def _no_such_layout(path: Path, rows: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, Any]) -> Problem:
    listed = list(dict.fromkeys(map(_words, rows.values())))
    hint = f"does not contain the run's layout, {_words(wanted)}; it contains {'; '.join(listed) or 'none'}"
    return Problem(_OPTION, str(path), f"{hint}. Forecast the run's layout with `shoestring simulate`")


def _words(row: Mapping[str, Any]) -> str:
    grid = f"pp{row['pp']} edp{row['edp']} ep{row['ep']}"
    layers = "+".join(map(str, row["layers_per_stage"]))
    return f"{grid} {row['schedule']} micro-batch {row['micro_batch']} layers {layers}"


def _other_price(planned: Mapping[str, Any], config: RunConfig) -> Iterator[str]:
    """Yield differences that change a run's cost but not its steps."""
    ours = _run_description(config)
    for key in _PRICE:
        if planned[key] != ours[key]:
            yield f"{key}: {_word(planned[key])} planned, {_word(ours[key])} run"


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
    return f"{value:,}" if isinstance(value, int) else str(shorten_for_message(value))
