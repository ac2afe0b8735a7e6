"""Names and spans of a timeline: what a communication belongs to, and what ran when.

Nothing is kept unless a recorder is given.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class TimelineTrack(StrEnum):
    """Rows of a timeline. Spans of one track may be nested, and do not overlap otherwise."""

    INSTRUCTION = "instruction"  # of the pipeline program, the optimizer, and what these wait for
    COMPUTE = "compute"  # phases of layers, and waiting for exchanges
    EXCHANGE = "exchange"  # what the exchange's worker does
    P2P_NEXT = "p2p next"  # messages towards the end of the pipeline
    P2P_PREV = "p2p prev"  # messages towards its beginning
    REDUCE = "reduce"  # sums of gradients, and weights handed out
    LAUNCH = "launch"  # moments: the computing thread has started a communication


PIPELINE_WAIT = "pipeline_wait"
EXPOSED_ALL_TO_ALL = "exposed_all_to_all"
GRADIENT_SYNC_WAIT = "gradient_sync_wait"
OPTIMIZER = "optimizer"


class SpanRecorder(Protocol):
    """Keeps spans and moments. `detail` is turned into text only if it is kept."""

    def span(self, track: TimelineTrack, name: str, detail: object = None) -> AbstractContextManager[object]:
        """What runs inside, from its beginning to its end."""
        ...

    def record_instant(self, track: TimelineTrack, name: str, detail: object = None) -> None:
        """A moment."""
        ...


class NullRecorder:
    """Keeps nothing."""

    def span(self, track: TimelineTrack, name: str, detail: object = None) -> AbstractContextManager[object]:
        """See `SpanRecorder`."""
        return _NOTHING

    def record_instant(self, track: TimelineTrack, name: str, detail: object = None) -> None:
        """See `SpanRecorder`."""


_NOTHING: AbstractContextManager[object] = nullcontext()
NULL_RECORDER = NullRecorder()


@dataclass(frozen=True)
class ExchangeLabel:
    """The place in the model and in the batch that an exchange serves."""

    layer: str
    """Such as `layer_03` or `mtp_01`."""
    micro_batch: int
    """Number within the step, on this rank."""

    def __str__(self) -> str:
        return f"{self.layer}, micro-batch {self.micro_batch}"


@dataclass(frozen=True)
class ExchangeCall:
    """One operation of the token exchange, for one layer and micro-batch."""

    operation: str
    label: ExchangeLabel

    def __str__(self) -> str:
        return f"{self.operation} of {self.label}"
