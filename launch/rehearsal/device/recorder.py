"""Recorder of one rehearsed rank: launches, live memory, events and findings."""

import sys
import weakref
from collections import defaultdict
from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor, UntypedStorage

from ..log import (
    CollectiveRecord,
    EventRecord,
    HostWait,
    KernelLaunches,
    LogEvent,
    P2PBatchRecord,
    P2POpRecord,
    RankFinding,
)
from .code_locations import function_location, line_location
from .spans import RehearsalSpanRecorder

COMPUTE_STREAM = "compute"
"""Name of the stream on which a rank computes."""
GroupKey: TypeAlias = tuple[str, tuple[int, ...]]
"""Name and ranks of a group."""
TensorKey: TypeAlias = tuple[tuple[int, ...], str]
"""Shape and dtype of a tensor."""
RowCounts: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""Rows for each rank of a group, and from each."""


class LiveTensorMemory:
    """Bytes of live device tensors, counted by storage."""

    def __init__(self, spans: RehearsalSpanRecorder) -> None:
        self._spans = spans
        self._alive: dict[int, weakref.ref[UntypedStorage]] = {}
        self.live_bytes = 0
        self.peak_bytes, self.peak_phase = 0, ""
        self.peak_bytes_by_phase: dict[str, int] = {}
        self.state_bytes, self.peak_while_building_bytes = 0, 0
        """Live bytes at the start of the step, and the peak before it."""

    def begin_step(self) -> None:
        """Restart the search for peaks at the current level."""
        self.state_bytes, self.peak_while_building_bytes = self.live_bytes, self.peak_bytes
        self.peak_bytes, self.peak_phase = self.live_bytes, self._spans.contexts[-1].phase
        self.peak_bytes_by_phase = {}

    def add_tensor(self, tensor: Tensor) -> None:
        """Count the storage of a device tensor, if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes()
        self._alive[key] = weakref.ref(storage, lambda _: self._on_free(key, size))
        self.live_bytes += size
        phase = self._spans.contexts[-1].phase
        if self.live_bytes > self.peak_bytes_by_phase.get(phase, -1):
            self.peak_bytes_by_phase[phase] = self.live_bytes
            if self.live_bytes > self.peak_bytes:
                self.peak_bytes, self.peak_phase = self.live_bytes, phase

    def _on_free(self, key: int, size: int) -> None:
        if self._alive.pop(key, None) is not None:
            self.live_bytes -= size


class RankRecorder:
    """Recorder of everything in the rank's log."""

    def __init__(self, spans: RehearsalSpanRecorder) -> None:
        self.spans = spans
        self.memory = LiveTensorMemory(spans)
        self.stream = COMPUTE_STREAM
        """Name of the current stream."""
        self.is_warm_up = True
        """True until the engine is built."""
        self.operations = 0
        self.events: list[LogEvent] = []
        self._launches: defaultdict[tuple[str, str, str, str, str], list[int]] = defaultdict(lambda: [0, 0])
        self._findings: dict[RankFinding, None] = {}
        self._event_count = 0

    @property
    def launches(self) -> tuple[KernelLaunches, ...]:
        """Launches of the step, the most bytes first."""
        rows = [KernelLaunches(*key, *counts) for key, counts in self._launches.items()]
        return tuple(sorted(rows, key=lambda row: -row.bytes))

    @property
    def findings(self) -> tuple[RankFinding, ...]:
        """Findings without repetition, in the order in which they were found."""
        return tuple(self._findings)

    def begin_step(self) -> None:
        """Restart the counts of launches, operations and peaks, after the engine is built."""
        self.is_warm_up = False
        self.operations = 0
        self._launches.clear()
        self.memory.begin_step()

    def record_launch(self, operation: str, size: int) -> None:
        """Count a launch that reads and writes `size` bytes."""
        place = self.spans.contexts[-1]
        key = (place.phase, place.layer, self.stream, operation, function_location(sys._getframe()))
        row = self._launches[key]
        row[0] += 1
        row[1] += size

    def record_finding(self, kind: str, text: str, place: str | None = None) -> None:
        """Record a finding, by default at the code location of the caller."""
        self._findings.setdefault(RankFinding(kind, text, place or self.current_location()))

    def current_location(self) -> str:
        """Return the current instruction and the code line of the caller."""
        return f"{self.spans.current_instruction}: {line_location(sys._getframe())}"

    def record_collective(
        self, group: GroupKey, operation: str, purpose: str, tensor: TensorKey, rows: RowCounts = ((), ())
    ) -> None:
        """Log a collective; for the arguments see `CollectiveRecord`."""
        stream, place, warms_up = self.stream, self.current_location(), self.is_warm_up
        self.events.append(CollectiveRecord(*group, operation, purpose, *tensor, *rows, stream, place, warms_up))

    def record_p2p_batch(self, group: GroupKey, sends: Sequence[P2POpRecord], receives: Sequence[P2POpRecord]) -> None:
        """Log a P2P batch."""
        messages, place = (tuple(sends), tuple(receives)), self.current_location()
        self.events.append(P2PBatchRecord(*group, *messages, self.stream, place, self.is_warm_up))

    def record_event(self, stream: str) -> int:
        """Log an event of a stream; return its number."""
        self._event_count += 1
        self.events.append(EventRecord(self._event_count, stream))
        return self._event_count

    def record_host_wait(self, event: int | None, stream: str, reason: str) -> None:
        """Log a wait of the host.

        Inside an FB it may wait only for the event of a dispatch's sizes: another wait delays the launches that overlap
        and is a finding.
        """
        spans, place = self.spans, self.current_location()
        self.events.append(HostWait(event, stream, reason, place, spans.is_inside_fb, self.is_warm_up))
        if spans.is_inside_fb and not (spans.is_inside_dispatch and reason == "event"):
            self.record_finding("host read", f"the host waits for stream {stream} ({reason}) inside an FB", place)
