"""Events of a run: one dataclass for each kind, and its line in `metrics.jsonl`.

A line is one flat JSON object: `time`, `kind`, `step`, then the fields of the kind, so `loss/mtp` is one key.
"""

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, TypeAlias

from ...comm.errors import ConfigError, Problem
from ...comm.files.ranges import not_empty
from ...comm.files.strict_json import (
    JsonValue,
    MalformedFileError,
    UnsupportedFormatError,
    json_key,
    key_in_json,
    parse_json,
)

JSON: TypeAlias = bool | int | float | str | Sequence["JSON"] | Mapping[str, "JSON"] | None

METRICS_FILE = "metrics.jsonl"
METRICS_FORMAT = 2
"""Number in each `run` event; without it, the format is 1, whose keys had other names."""
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")
_LAST_SECOND = 10**11
"""Largest time in seconds since the epoch: the year 5138, which every calendar library supports."""
_MOST = 2**53
"""Largest count or step."""


def _read_number(item: JsonValue) -> float:
    return float(item.value) if item.value in _NOT_FINITE else item.as_number()


_Number = Annotated[float, _read_number, float]
"""Number that may be NaN or infinite; the file holds those as strings."""
_Finite = Annotated[float, JsonValue.as_number, float]
_Count = Annotated[int, lambda item: item.as_integer(0, _MOST)]
_Tree = Annotated[Mapping[str, Any], JsonValue.as_mapping, dict]
_Seconds = Annotated[float, lambda item: item.as_number(0, _LAST_SECOND)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One event of a run; itself, an event of a kind that a later version has added."""

    step: _Count
    """Optimizer steps done when it happened."""
    time: _Seconds = field(default_factory=time.time)
    """Seconds since the epoch."""

    @property
    def kind(self) -> str:
        """Name of the kind in the file."""
        return _KIND_OF.get(type(self), "")

    @property
    def values(self) -> Mapping[str, JSON]:
        """Fields and metrics by their keys in the file, without `time` and `step`."""
        values: dict[str, JSON] = {}
        for name, key, default in _VALUE_FIELDS[type(self)]:
            value = getattr(self, name)
            if name == _METRICS:
                values |= value
            elif value is not None or default is not None:
                values[key] = value
        return values

    def to_json_line(self) -> str:
        """Return one JSON line without newline. Raises `ValueError` for a metric named time, kind or step."""
        head, values = {"time": round(self.time, 3), "kind": self.kind, "step": self.step}, self.values
        if taken := [key for key in head if key in values]:
            raise ValueError(f"the metrics of a {self.kind} event may not be named {', '.join(taken)}")
        return json.dumps({**head, **{key: _strict(value) for key, value in values.items()}}, allow_nan=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStarted(Event):
    """A launch begins: its configuration, device and model size."""

    format: int = METRICS_FORMAT
    version: str
    """Version of Shoestring."""
    config: _Tree
    ranks: _Count
    device: str
    compute_dtype: str
    linear: str
    """Precision of the Linears: `native` or `fp8`."""
    attention: str
    """Attention kernel, and the reason for it."""
    parameters: _Count
    active_parameters: _Count
    total_steps: _Count
    flops_per_token: _Finite
    mfu_convention: str
    peak_tflops: _Finite
    peak_source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class InitialWeightsLoaded(Event):
    """The run begins with the weights of a checkpoint."""

    checkpoint: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResumed(Event):
    """The weights are those after `step` steps again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepLogged(Event):
    """A step was applied to the weights; a run logs one in `telemetry.log_every`."""

    loss: _Number
    """Nats per token."""
    mtp_loss: _Number | None = field(metadata=json_key("loss/mtp"))
    balance_loss: _Number = field(metadata=json_key("loss/seq_aux"))
    total_loss: _Number = field(metadata=json_key("loss/total"))
    learning_rate: _Finite
    mtp_loss_scaling_factor: _Finite
    router_bias_update_rate: _Finite
    grad_norm: _Number
    """Norm of the gradient before clipping."""
    metrics: _Tree
    """Loads, bytes and routing by their keys in the file, such as `tokens_per_expert/layer_01` (`step_metrics`)."""
    tokens: _Count
    """Tokens that the weights have been trained on."""
    tokens_per_second: _Finite
    tflops: _Finite
    """TFLOPS per rank."""
    mfu: _Finite
    gpu_hours: _Finite
    budget_share: _Finite
    budget_left: _Finite
    projected_gpu_hours: _Finite | None
    """GPU-hours at the end of the run; None after too few steps."""
    goodput: _Finite
    eta_seconds: _Finite
    total_steps: _Count

    def metric(self, key: str) -> float | None:
        """Return a number among `metrics`, or None."""
        return parse_number(self.metrics.get(key))


@dataclass(frozen=True, kw_only=True, slots=True)
class LossEvaluated(Event):
    """Validation loss in nats per token."""

    loss: _Number
    targets: _Count
    """Tokens that the loss is a mean over."""
    unigram_entropy: _Finite
    """Loss of a model that knows only the frequency of each token."""
    averaged_loss: _Number | None = field(default=None, metadata=json_key("loss/averaged"))
    """Loss of the moving average of the weights, if there is one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSampled(Event):
    """Generated text with its prompt."""

    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSaved(Event):
    """A checkpoint is on disk."""

    path: str


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryMeasured(Event):
    """Memory of every rank after a sampled step, in bytes."""

    quantity: str
    """Quantity that was measured, in words."""
    limit: _Count | None
    """Memory of a device; None on a CPU."""
    now: Sequence[int] = not_empty()
    peak: Sequence[int] = not_empty()


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceWritten(Event):
    """A timeline was written."""

    path: str
    metrics: _Tree
    """Seconds of each term by rank: `trace/F` and others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetReported(Event):
    """Cost of the run at its end."""

    metrics: _Tree
    """The ledger's summary (`LedgerSummary.to_json`), flat."""
    gpu_hours: _Finite
    gpu_hours_per_trillion_tokens: _Finite | None
    published_gpu_hours_per_trillion_tokens: _Finite
    budget_share: _Finite


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStopped(Event):
    """A launch ends."""

    reason: str
    """`done`, or why the run is not complete."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WarningRaised(Event):
    """A problem that does not end the run."""

    about: str = "telemetry"
    message: str


EVENT_KINDS: Mapping[str, type[Event]] = MappingProxyType(
    {
        "run": RunStarted,
        "start": InitialWeightsLoaded,
        "resume": RunResumed,
        "step": StepLogged,
        "evaluation": LossEvaluated,
        "sample": TextSampled,
        "checkpoint": CheckpointSaved,
        "memory": MemoryMeasured,
        "trace": TraceWritten,
        "budget": BudgetReported,
        "stop": RunStopped,
        "warning": WarningRaised,
    }
)
"""Class of each kind."""
_KIND_OF = {cls: kind for kind, cls in EVENT_KINDS.items()}
_METRICS = "metrics"
"""Field that holds what is under other keys of its line."""
_CLASSES: tuple[type[Event], ...] = (Event, *EVENT_KINDS.values())
_VALUE_FIELDS = {
    cls: [(each.name, key_in_json(each), each.default) for each in dataclasses.fields(cls)[2:]] for cls in _CLASSES
}
"""Name, key in the file and default of each field but `step` and `time`."""
_KNOWN_KEYS = {cls: {"time", "kind", "step", *(key for _, key, _ in fields)} for cls, fields in _VALUE_FIELDS.items()}


def parse_event(path: Path, number: int, line: str) -> Event:
    """Parse line `number` of the file at `path`.

    Raises `ConfigError` for a broken line, and `UnsupportedFormatConfigError` for a `run` event of another format.
    """
    try:
        item = parse_json(line if line.isascii() else line.encode(errors="surrogateescape"))
        cls = EVENT_KINDS.get(item["kind"].as_string(), Event)
        if cls is RunStarted:
            item.require_format("metrics", METRICS_FORMAT, default=1)
        tree, known = item.as_mapping(), _KNOWN_KEYS[cls]
        if _METRICS in known:
            others = tree.copy()
            for key in known:
                others.pop(key, None)
            tree[_METRICS] = others
        return item.as_dataclass(cls, ignore_unknown_keys=True)
    except UnsupportedFormatError as error:
        raise error.to_config_error(f"{path}:{number}") from error
    except MalformedFileError as error:
        hint = f"not an event ({error}); restore or delete this line"
        raise ConfigError([Problem(f"{path}:{number}", line[:80], hint)]) from error


def parse_number(value: JSON) -> float | None:
    """Return `value` as a number, also from the string of NaN or an infinity; None for anything else."""
    if isinstance(value, str):
        return float(value) if value in _NOT_FINITE else None
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    except OverflowError:  # an integer beyond the range of a float
        return None


def numbers_in_list(value: JSON) -> list[float]:
    """Return the numbers in the list `value`; empty if it is no list."""
    items = value if isinstance(value, Sequence) and not isinstance(value, str) else ()
    return [number for item in items if (number := parse_number(item)) is not None]


def _strict(value: JSON) -> JSON:
    """Return `value` with NaN and infinities as strings."""
    # JSON has no NaN; strings, as in protobuf's JSON mapping, keep the file readable for every parser.
    if isinstance(value, float) and not math.isfinite(value):
        return _NOT_FINITE[0 if math.isnan(value) else 1 if value > 0 else 2]
    if isinstance(value, Mapping):
        return {key: _strict(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_strict(inner) for inner in value]
    return value
