"""Timeline: tracks, span recorders, and labels of communications. The default recorder keeps nothing."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class TimelineTrack(StrEnum):
    """Rows of a timeline. Spans of one track may be nested, but do not overlap otherwise."""

    INSTRUCTION = "instruction"  # instructions of the pipeline program, the optimizer, and their waits
    COMPUTE = "compute"  # phases of layers, and waits for exchanges
    EXCHANGE = "exchange"  # operations of the token dispatcher
    P2P_NEXT = "p2p next"  # messages to the next pipeline rank
    P2P_PREV = "p2p prev"  # messages to the previous pipeline rank
    REDUCE = "reduce"  # reduce-scatters of gradients, all-gathers of weights
    LAUNCH = "launch"  # instants at which the computing thread starts a communication


PIPELINE_WAIT = "pipeline_wait"
EXPOSED_ALL_TO_ALL = "exposed_all_to_all"
GRADIENT_SYNC_WAIT = "gradient_sync_wait"
OPTIMIZER = "optimizer"


class SpanRecorder(Protocol):
    """Records spans and instants. `detail` becomes text only if it is kept."""

    def span(self, track: TimelineTrack, name: str, detail: object = None) -> AbstractContextManager[object]:
        """Return a context whose begin and end are recorded as a span."""
        ...

    def record_instant(self, track: TimelineTrack, name: str, detail: object = None) -> None:
        """Record an instant."""
        ...


class NullRecorder:
    """Recorder that keeps nothing."""

    def span(self, track: TimelineTrack, name: str, detail: object = None) -> AbstractContextManager[object]:
        """See `SpanRecorder`."""
        return _NOTHING

    def record_instant(self, track: TimelineTrack, name: str, detail: object = None) -> None:
        """See `SpanRecorder`."""


# One object for all spans: a step without a trace allocates nothing for them.
_NOTHING: AbstractContextManager[object] = nullcontext()
NULL_RECORDER = NullRecorder()


@dataclass(frozen=True)
class ExchangeLabel:
    """Layer and micro-batch of an exchange."""

    layer: str
    """Layer name, such as `layer_03` or `mtp_01`."""
    micro_batch: int
    """Number of the micro-batch within the step, on this rank."""

    def __str__(self) -> str:
        return f"{self.layer}, micro-batch {self.micro_batch}"


@dataclass(frozen=True)
class ExchangeCall:
    """One operation of the token dispatcher for one layer and micro-batch."""

    operation: str
    label: ExchangeLabel

    def __str__(self) -> str:
        return f"{self.operation} of {self.label}"
