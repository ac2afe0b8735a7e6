"""The JSON of `shoestring plan` and `shoestring simulate`: its keys, and the planned figures of a run read from it."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ... import __version__
from ...comm.errors import ConfigError, Problem, raise_if_any
from ...comm.files.file_io import read_json
from ...comm.files.ranges import between
from ...comm.files.strict_json import JsonValue, MalformedFileError, shorten_for_message
from ...trainer.build import build_stage_layout
from ...trainer.config import RunConfig
from ...trainer.ledger.terms import STEP_TIME_TERMS
from .config_adapter import configured_recipe
from .forecast import StepForecast

PLAN_FORMAT = 2
"""Number in the JSON of `simulate` and `plan`; without it, the format is 1, whose keys had other names."""

_OPTION = "--against"
_COMMAND = "write one with `shoestring plan … --format json > FILE`, or with simulate"
_MAX_BYTES = 2**28
_MAX_COUNT = 2**31
_MAX_NUMBER = 10**30
"""Limits of a plan's numbers: more than any run has, and products of them do not overflow."""
_SAME = ("model", "sequence_length", "global_batch_size")
"""Values of a plan that a run must share: with others its steps are different work."""
_PRICE = ("rampup_start_batch_size", "rampup_batch_size_increment", "rampup_tokens", "tokens", "cluster")
"""Values of a plan that change a run's price but not its steps."""


def plan_header() -> dict[str, object]:
    """Return the first keys of the JSON of `simulate` and `plan`: its format, and the version that writes it."""
    return {"format": PLAN_FORMAT, "version": __version__}


def run_description(config: RunConfig) -> dict[str, Any]:
    """Return what determines the price of a run besides the layout, as JSON gives it back: tuples are lists."""
    names = ("sequence_length", "global_batch_size", *_PRICE[:-1])
    training = {name: getattr(config.training, name) for name in names}
    description = {"model": asdict(config.model), **training, "cluster": config.cluster.name}
    return dict(json.loads(json.dumps(description)))


def layout_as_dict(forecast: StepForecast, gpu_hours: float) -> dict[str, object]:
    """Return a layout and its forecast as plain values; `gpu_hours` are of pre-training, terms are means over ranks."""
    topology, recipe = forecast.layout.topology, forecast.recipe
    return {
        "pp": topology.pp,
        "edp": topology.edp,
        "ep": topology.ep,
        "schedule": forecast.layout.schedule,
        "micro_batch": forecast.layout.micro_batch_size,
        "layers_per_stage": [stage.dense_layers + stage.moe_layers for stage in forecast.stage_shapes],
        "precision": recipe.precision.value,
        "recompute": sorted(recipe.recompute),
        "exchange": recipe.exchange_name,
        "overlap": recipe.overlap,
        "moment_bytes": recipe.moment_bytes,
        "comm_sms": recipe.comm_sms,
        "step_seconds": forecast.step_seconds,
        "tokens_per_second_per_gpu": forecast.tokens_per_second_per_gpu,
        "mfu": forecast.mfu,
        "memory_bytes": forecast.peak_memory.total,
        "memory_bytes_with_fragmentation": forecast.peak_bytes_with_fragmentation,
        "gpu_hours": gpu_hours,
        "time_terms": forecast.mean_time_terms,
        "bottleneck": forecast.bottleneck,
    }


@dataclass(frozen=True, kw_only=True)
class LayoutFigures:
    """Values of one layout in the file that are read here. Times are means over ranks."""

    pp: int = between(1, _MAX_COUNT)
    edp: int = between(1, _MAX_COUNT)
    ep: int = between(1, _MAX_COUNT)
    schedule: str
    micro_batch: int = between(1, _MAX_COUNT)
    layers_per_stage: tuple[int, ...]
    precision: str
    exchange: str
    recompute: tuple[str, ...]
    overlap: bool
    moment_bytes: int = between(1, _MAX_COUNT)
    step_seconds: float = between(0, _MAX_NUMBER)
    """Seconds per step, the sum of the terms."""
    tokens_per_second_per_gpu: float = between(0, _MAX_NUMBER)
    gpu_hours: float = between(0, _MAX_NUMBER)
    """GPU-hours of the whole pre-training, steps only."""
    memory_bytes: float = between(0, _MAX_NUMBER)
    """Bytes of the rank that needs most memory."""
    time_terms: dict[str, float]
    """Seconds per step, by the names of `trainer.ledger.terms.STEP_TIME_TERMS`."""

    @property
    def tokens_per_second(self) -> float:
        """Throughput of all GPUs together."""
        return self.tokens_per_second_per_gpu * self.pp * self.edp * self.ep

    @property
    def words(self) -> str:
        """The layout without its recipe and figures; equal for equal layouts."""
        return _layout_in_words(self.pp, self.edp, self.ep, self.schedule, self.micro_batch, self.layers_per_stage)


@dataclass(frozen=True)
class PlanEntry:
    """Layout of a plan, compared with a run."""

    layout_name: str
    """Which layout of the plan this is, in words."""
    figures: LayoutFigures
    deviations: Sequence[str]
    """Differences between plan and run that leave the plan comparable, in words."""


def _layout_in_words(pp: int, edp: int, ep: int, schedule: str, micro_batch: int, layers: Iterable[int]) -> str:
    return f"pp{pp} edp{edp} ep{ep} {schedule} micro-batch {micro_batch} layers {'+'.join(map(str, layers))}"


def read_plan_entry(path: Path, config: RunConfig, precision: str | None) -> PlanEntry:
    """Read the planned figures of the layout of `config`; `precision` is that of the run's GEMMs, None if unknown.

    Among entries with the run's layout it takes the one whose recipe has most in common with the run, then the
    fastest. Raises `ConfigError` for a file that is not a plan, and for a plan of another model, sequence length,
    batch or layout.
    """
    run, layouts = _read(path)
    raise_if_any(_other_run(path, run, run_description(config)))
    wanted = _run_in_words(config)
    same = {name: layout for name, layout in layouts.items() if layout.words == wanted}
    if not same:
        listed = "; ".join(dict.fromkeys(layout.words for layout in layouts.values())) or "none"
        hint = f"does not contain the run's layout, {wanted}; it contains {listed}"
        raise ConfigError(
            [Problem(_OPTION, str(path), f"{hint}. Forecast the run's layout with `shoestring simulate`")]
        )
    # A plan may list one layout several times with other precision or recompute. `min` keeps the first of equals,
    # and the file lists the fastest first.
    name = min(same, key=lambda name: len(list(_other_recipe(same[name], config, precision))))
    deviations = [*_other_price(run, config), *_other_recipe(same[name], config, precision)]
    return PlanEntry(name, same[name], deviations)


def _read(path: Path) -> tuple[Mapping[str, Any], Mapping[str, LayoutFigures]]:
    """Read the description of the planned run, and every layout by its name, the fastest first.

    Raises `ConfigError` unless the file is a plan of this format with all keys that are read here.
    """
    try:
        tree = read_json(path, _MAX_BYTES)
        tree.as_mapping()
        found = tree.get("format")
        if found is None or found.value != PLAN_FORMAT:
            raise ConfigError([_other_format(path, tree)])
        run = tree["run"]
        run["model"].as_mapping()
        for key in (*_SAME, *_PRICE):
            run[key]  # raises if it is missing
        return run.as_mapping(), dict(_read_layouts(tree))
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


def _read_layouts(tree: JsonValue) -> Iterator[tuple[str, LayoutFigures]]:
    """Yield (name, layout) of every layout of the file, the fastest first. Raises `MalformedFileError`."""
    if "layouts" not in tree:
        yield "the simulated layout", _read_layout(tree["layout"])
        return
    items = tree["layouts"].as_list()
    for place, item in enumerate(items, 1):
        yield f"layout {place} of {len(items)}", _read_layout(item)
    yield "the configured layout", _read_layout(tree["configured"])


def _read_layout(item: JsonValue) -> LayoutFigures:
    layout = item.as_dataclass(LayoutFigures, ignore_unknown_keys=True)
    for term in STEP_TIME_TERMS:
        item["time_terms"][term].as_number(-_MAX_NUMBER, _MAX_NUMBER)
    return layout


def _run_in_words(config: RunConfig) -> str:
    topology, schedule = config.topology, config.schedule
    layers = (len(layers) for layers in build_stage_layout(config).stage_layers)
    return _layout_in_words(topology.pp, topology.edp, topology.ep, schedule.name, schedule.micro_batch_size, layers)


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


def _other_price(planned: Mapping[str, Any], config: RunConfig) -> Iterator[str]:
    """Yield differences that change a run's cost but not its steps."""
    ours = run_description(config)
    for key in _PRICE:
        if planned[key] != ours[key]:
            yield f"{key}: {_word(planned[key])} planned, {_word(ours[key])} run"


def _other_recipe(layout: LayoutFigures, config: RunConfig, precision: str | None) -> Iterator[str]:
    """Yield differences that change the time of a step."""
    run = configured_recipe(config)
    pairs: dict[str, tuple[object, object]] = {
        "precision": (layout.precision, layout.precision if precision is None else precision),
        "recompute": (_parts(layout.recompute), _parts(sorted(run.recompute))),
        "exchange": (layout.exchange, run.exchange_name if layout.ep > 1 else layout.exchange),
        "overlap": (layout.overlap, run.overlap),
        "moment_bytes": (layout.moment_bytes, run.moment_bytes),
    }
    for key, (planned, ours) in pairs.items():
        if planned != ours:
            yield f"{key}: {planned} planned, {ours} run"


def _parts(names: Sequence[str]) -> str:
    return "+".join(names) or "nothing"


def _word(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(shorten_for_message(value))
