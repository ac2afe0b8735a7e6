"""Log of one rehearsed rank: written by the rank's process, and read by the comparison of ranks.

`events` hold all communication and all waits of the rank, in the order of its host. A stream is identified by its name
(`compute`, or the track of the communicator that created it) and an event by its number.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

from ...comm.files.file_io import read_json


@dataclass(frozen=True)
class CollectiveRecord:
    """Collective of a group, queued on a stream."""

    group: str
    """Name of the group, such as `ep` or `dense gradients`; with `ranks` it identifies one communicator."""
    ranks: tuple[int, ...]
    operation: str
    """`all_reduce`, `all_to_all`, `reduce_scatter` or `all_gather`."""
    purpose: str
    """Purpose of the operation, such as `dispatch of layer_03, micro-batch 2`."""
    shape: tuple[int, ...]
    """Shape that is equal on all ranks: of the whole tensor, or for `all_to_all` of one row."""
    dtype: str
    sends: tuple[int, ...]
    """Rows for each rank of the group in an `all_to_all`; empty otherwise."""
    receives: tuple[int, ...]
    """Rows from each rank of the group in an `all_to_all`; empty otherwise."""
    stream: str
    code_location: str
    """Instruction and code line."""
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
    """P2P batch: messages posted together on one communicator, queued on a stream."""

    group: str
    ranks: tuple[int, ...]
    sends: tuple[P2POpRecord, ...]
    receives: tuple[P2POpRecord, ...]
    stream: str
    code_location: str
    is_warm_up: bool = False


@dataclass(frozen=True)
class EventRecord:
    """Record of an event on a stream."""

    event: int
    stream: str


@dataclass(frozen=True)
class StreamWait:
    """Wait of a stream for an event, before all that is queued on it later."""

    event: int
    stream: str


@dataclass(frozen=True)
class HostWait:
    """Wait of the host for an event, or for everything queued on a stream (`event` is None)."""

    event: int | None
    stream: str
    reason: str
    """`read` (of a tensor's values), `event`, or `synchronize`."""
    code_location: str
    is_inside_fb: bool = False
    """True between the first and the last operation of an FB."""
    is_warm_up: bool = False
    """True before the step, while model and optimizer are built."""


LogEvent: TypeAlias = CollectiveRecord | P2PBatchRecord | EventRecord | StreamWait | HostWait
Event = TypeVar("Event", bound=LogEvent)


@dataclass(frozen=True)
class KernelLaunches:
    """Count of one operation's launches at one code location, and the bytes that they read and write."""

    phase: str
    """Phase, such as `attn(F)`, `mlp(B)`, `dispatch`, `optimizer`."""
    layer: str
    """Layer, such as `layer_03`; empty outside of layers."""
    stream: str
    operation: str
    code_location: str
    launches: int
    bytes: int


@dataclass(frozen=True)
class RankFinding:
    """Finding in the log of one rank."""

    kind: str
    """`device`, `memory`, `host read`, `deprecated` or `error`."""
    text: str
    code_location: str


@dataclass(frozen=True)
class DeviceMemoryRecord:
    """Bytes of live tensors on the device, and the prediction of `shoestring memory` without the fixed reserve."""

    state_bytes: int
    peak_while_building_bytes: int
    """Peak while model and optimizer were built."""
    peak_bytes: int
    peak_phase: str
    peak_bytes_by_phase: dict[str, int]
    """Peak during each phase."""
    predicted_peak_bytes: float
    capacity_bytes: float | None
    """Memory of the GPU without the fixed reserve; None if the cluster configuration has none."""


@dataclass(frozen=True)
class RankLog:
    """Complete log of one rank."""

    rank: int
    pp_rank: int
    world_size: int
    micro_batches: int
    group_creations: int
    operations: int
    """Number of operations that torch dispatched."""
    events: tuple[LogEvent, ...]
    launches: tuple[KernelLaunches, ...]
    findings: tuple[RankFinding, ...]
    memory: DeviceMemoryRecord
    assumptions: tuple[str, ...]
    """Assumed values of numbers that only a real device computes."""
    seconds: float

    def events_of(self, kind: type[Event]) -> Iterator[Event]:
        """Yield the events of one kind, warm-up included."""
        return (event for event in self.events if isinstance(event, kind))

    def write(self, path: Path) -> None:
        """Write the log as JSON."""
        tree = asdict(self)
        tree["events"] = [{"kind": type(event).__name__, **asdict(event)} for event in self.events]
        path.write_text(json.dumps(tree))

    @staticmethod
    def read(path: Path) -> "RankLog":
        """Read a log that `write` has written."""
        return read_json(path).as_dataclass(RankLog)
