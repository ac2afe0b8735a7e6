"""Recorder of one rehearsed rank: launches, live memory, events and findings."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence

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
    StreamWait,
)
from .code_locations import CodeLocations
from .spans import RehearsalSpanRecorder

COMPUTE_STREAM = "compute"
"""Name of the stream on which a rank computes."""


class _LiveStorage(weakref.ref[UntypedStorage]):
    """Weak reference to a live storage, with the key and size that are needed when it is freed."""

    key: int
    size: int


class LiveTensorMemory:
    """Bytes of live device tensors, counted by storage."""

    def __init__(self, spans: RehearsalSpanRecorder) -> None:
        self._spans = spans
        self._alive: dict[int, _LiveStorage] = {}
        self.live_bytes = 0
        self.peak_bytes, self.peak_phase = 0, ""
        self.peak_bytes_by_phase: dict[str, int] = {}

    def reset_peak(self) -> None:
        """Restart the search for peaks at the current level."""
        self.peak_bytes, self.peak_phase = self.live_bytes, self._spans.contexts[-1].phase
        self.peak_bytes_by_phase = {}

    def add_tensor(self, tensor: Tensor) -> None:
        """Count the storage of a device tensor, if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        alive = _LiveStorage(storage, self._on_free)
        alive.key, alive.size = key, storage.nbytes()
        self._alive[key] = alive
        self.live_bytes += alive.size
        phase = self._spans.contexts[-1].phase
        if self.live_bytes > self.peak_bytes_by_phase.get(phase, -1):
            self.peak_bytes_by_phase[phase] = self.live_bytes
            if self.live_bytes > self.peak_bytes:
                self.peak_bytes, self.peak_phase = self.live_bytes, phase

    def _on_free(self, alive: weakref.ref[UntypedStorage]) -> None:
        assert isinstance(alive, _LiveStorage)
        if self._alive.pop(alive.key, None) is not None:
            self.live_bytes -= alive.size


class RankRecorder:
    """Recorder of everything in the rank's log."""

    def __init__(self, spans: RehearsalSpanRecorder) -> None:
        self.spans = spans
        self.code_locations = CodeLocations()
        self.memory = LiveTensorMemory(spans)
        self.stream = COMPUTE_STREAM
        """Name of the current stream."""
        self.is_warm_up = True
        """True until the engine is built."""
        self.operations = 0
        self.events: list[LogEvent] = []
        self._launches: dict[tuple[str, str, str, str, str], list[int]] = {}
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
        self.memory.reset_peak()

    def record_launch(self, operation: str, size: int) -> None:
        """Count a launch that reads and writes `size` bytes."""
        place = self.spans.contexts[-1]
        key = (place.phase, place.layer, self.stream, operation, self.code_locations.function_location(sys._getframe()))
        row = self._launches.get(key)
        if row is None:
            row = self._launches[key] = [0, 0]
        row[0] += 1
        row[1] += size

    def record_finding(self, kind: str, text: str, place: str | None = None) -> None:
        """Record a finding, by default at the code location of the caller."""
        self._findings.setdefault(RankFinding(kind, text, place or self.current_location()))

    def current_location(self) -> str:
        """Return the current instruction and the code line of the caller."""
        return f"{self.spans.current_instruction}: {self.code_locations.line_location(sys._getframe())}"

    def record_collective(
        self,
        group: tuple[str, tuple[int, ...]],
        operation: str,
        what: str,
        tensor: tuple[Sequence[int], str],
        rows: tuple[Sequence[int], Sequence[int]] = ((), ()),
    ) -> None:
        """Log a collective: `group` is name and ranks, `tensor` shape and dtype, `rows` the sent and received rows."""
        self.events.append(
            CollectiveRecord(
                group=group[0],
                ranks=group[1],
                operation=operation,
                purpose=what,
                shape=tuple(tensor[0]),
                dtype=tensor[1],
                sends=tuple(rows[0]),
                receives=tuple(rows[1]),
                stream=self.stream,
                code_location=self.current_location(),
                is_warm_up=self.is_warm_up,
            )
        )

    def record_p2p_batch(
        self, group: tuple[str, tuple[int, ...]], sends: Sequence[P2POpRecord], receives: Sequence[P2POpRecord]
    ) -> None:
        """Log a P2P batch."""
        place = self.current_location()
        self.events.append(
            P2PBatchRecord(group[0], group[1], tuple(sends), tuple(receives), self.stream, place, self.is_warm_up)
        )

    def record_event(self, stream: str) -> int:
        """Log an event of a stream; return its number."""
        self._event_count += 1
        self.events.append(EventRecord(self._event_count, stream))
        return self._event_count

    def record_stream_wait(self, event: int, stream: str) -> None:
        """Log a wait of a stream for an event."""
        self.events.append(StreamWait(event, stream))

    def record_host_wait(self, event: int | None, stream: str, reason: str) -> None:
        """Log a wait of the host; inside an FB, any but that for the sizes of a dispatch is a finding."""
        spans, place = self.spans, self.current_location()
        self.events.append(HostWait(event, stream, reason, place, spans.is_inside_fb, self.is_warm_up))
        if spans.is_inside_fb and not spans.is_inside_dispatch:
            self.record_finding("host read", f"the host waits for stream {stream} ({reason}) inside an FB", place)
