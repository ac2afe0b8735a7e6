"""What one rehearsed rank did, as data: written by the process of the rank, read by what compares ranks.

`events` hold everything that one rank does with others or waits for, in the order of its host. A stream is known by its
name (`compute`, or the track of the worker that made it) and an event by its number.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias


@dataclass(frozen=True)
class CollectiveRecord:
    """An operation of all ranks of a group, queued on a stream."""

    group: str
    """What the group is for, such as `ep` or `dense gradients`; with `ranks` it names one communicator."""
    ranks: tuple[int, ...]
    operation: str
    """`all_reduce`, `all_to_all`, `reduce_scatter` or `all_gather`."""
    purpose: str
    """Such as `dispatch of layer_03, micro-batch 2`."""
    shape: tuple[int, ...]
    """Of the tensor that all ranks have alike: all of it but for `all_to_all`, where it is that of one row."""
    dtype: str
    sends: tuple[int, ...]
    """Of an all_to_all: rows for each rank of the group. Empty otherwise."""
    receives: tuple[int, ...]
    """Of an all_to_all: rows from each rank of the group. Empty otherwise."""
    stream: str
    code_location: str
    """The instruction and the line of our code."""
    is_warm_up: bool = False


@dataclass(frozen=True)
class P2POpRecord:
    """One end of a message between two ranks."""

    purpose: str
    peer: int
    """Global rank of the other end."""
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class P2PBatchRecord:
    """Messages that are posted together on one communicator, queued on a stream."""

    group: str
    ranks: tuple[int, ...]
    sends: tuple[P2POpRecord, ...]
    receives: tuple[P2POpRecord, ...]
    stream: str
    code_location: str
    is_warm_up: bool = False


@dataclass(frozen=True)
class EventRecord:
    """An event is recorded on a stream."""

    event: int
    stream: str


@dataclass(frozen=True)
class StreamWait:
    """What is queued on a stream from here on waits for an event."""

    event: int
    stream: str


@dataclass(frozen=True)
class HostWait:
    """The host waits: for an event, or for all that is queued on a stream (`event` is None)."""

    event: int | None
    stream: str
    reason: str
    """`read` (of a tensor's numbers), `event`, or `synchronize`."""
    code_location: str
    is_inside_fb: bool = False
    """Whether it happens while an FB runs, of its first to its last operation."""
    is_warm_up: bool = False
    """Whether it happens before the step, while model and optimizer are made."""


LogEvent: TypeAlias = CollectiveRecord | P2PBatchRecord | EventRecord | StreamWait | HostWait


@dataclass(frozen=True)
class KernelLaunches:
    """Operations of one kind that one place of the code launches, and the bytes that they read and write."""

    phase: str
    """Such as `attn(F)`, `mlp(B)`, `dispatch`, `optimizer`."""
    layer: str
    """Such as `layer_03`; empty where it is no layer's."""
    stream: str
    operation: str
    code_location: str
    launches: int
    bytes: int


@dataclass(frozen=True)
class RankFinding:
    """A fault that one rank alone shows."""

    kind: str
    """`device`, `memory`, `host read`, `deprecated` or `error`."""
    text: str
    code_location: str


@dataclass(frozen=True)
class DeviceMemoryRecord:
    """Bytes of live tensors on the device, and what `shoestring memory` predicts without its fixed reserve."""

    state: int
    building: int
    """The most while model and optimizer were made."""
    peak: int
    peak_phase: str
    by_phase: dict[str, int]
    """The most while each phase ran."""
    predicted: float
    capacity: float | None
    """Of the GPU, less the fixed reserve; None where the cluster does not say."""


@dataclass(frozen=True)
class RankLog:
    """Everything that was seen of one rank."""

    rank: int
    pp_rank: int
    world_size: int
    micro_batches: int
    group_creations: int
    operations: int
    """That torch dispatched."""
    events: tuple[LogEvent, ...]
    launches: tuple[KernelLaunches, ...]
    findings: tuple[RankFinding, ...]
    memory: DeviceMemoryRecord
    assumptions: tuple[str, ...]
    """What the rehearsal put in the place of numbers that only a device would have."""
    seconds: float

    def write(self, path: Path) -> None:
        """Write as JSON."""
        tree = asdict(self)
        tree["events"] = [{"kind": type(event).__name__, **asdict(event)} for event in self.events]
        path.write_text(json.dumps(tree))

    @staticmethod
    def read(path: Path) -> RankLog:
        """Read what `write` wrote."""
        tree = json.loads(path.read_text())
        events = tuple(_event(dict(each)) for each in tree.pop("events"))
        launches = tuple(KernelLaunches(**each) for each in tree.pop("launches"))
        findings = tuple(RankFinding(**each) for each in tree.pop("findings"))
        memory, assumptions = DeviceMemoryRecord(**tree.pop("memory")), tuple(tree.pop("assumptions"))
        return RankLog(
            events=events, launches=launches, findings=findings, memory=memory, assumptions=assumptions, **tree
        )


_EVENTS = {kind.__name__: kind for kind in (CollectiveRecord, P2PBatchRecord, EventRecord, StreamWait, HostWait)}


def _event(values: dict[str, Any]) -> LogEvent:
    kind = _EVENTS[values.pop("kind")]
    for name in ("sends", "receives"):
        if kind is P2PBatchRecord:
            values[name] = tuple(_message(each) for each in values[name])
        elif name in values:
            values[name] = tuple(values[name])
    for name in ("ranks", "shape"):
        if name in values:
            values[name] = tuple(values[name])
    event: LogEvent = kind(**values)
    return event


def _message(values: dict[str, Any]) -> P2POpRecord:
    return P2POpRecord(**{**values, "shape": tuple(values["shape"])})
