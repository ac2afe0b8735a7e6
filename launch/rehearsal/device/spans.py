"""Span recorder of a rehearsed rank: the current instruction, phase and layer."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ....comm.trace import EXPOSED_ALL_TO_ALL, PIPELINE_WAIT, ExchangeLabel, TimelineTrack
from ....parallelism.pipeline.program import Op

_PHASE_OF_LAYER = re.compile(r"^(?P<phase>.+?) of (?P<layer>\w+), micro-batch \d+$")
_DISPATCH = re.compile(r"\bdispatch of \w+, micro-batch \d+")


@dataclass(frozen=True)
class OperationContext:
    """Phase and layer to which an operation belongs."""

    phase: str
    layer: str


class RehearsalSpanRecorder:
    """`comm.trace.SpanRecorder` of a rehearsal. Spans of all tracks form one stack, since there is one thread."""

    def __init__(self, phase: str) -> None:
        """Start with `phase` as the phase outside of all spans."""
        self.contexts = [OperationContext(phase, "")]
        self.open_span_names: list[str] = []
        """Names of the open spans, the innermost last."""
        self.instruction: object = None
        self.is_inside_fb = False
        """True while an FB runs."""

    def set_base_phase(self, phase: str) -> None:
        """Set the phase outside of all spans."""
        self.contexts[0] = OperationContext(phase, "")

    @contextmanager
    def span(self, track: TimelineTrack, name: str, detail: object = None) -> Iterator[None]:
        """See `SpanRecorder`."""
        if name in (EXPOSED_ALL_TO_ALL, PIPELINE_WAIT):
            yield
            return
        is_instruction = track is TimelineTrack.INSTRUCTION and name in _INSTRUCTIONS
        self.open_span_names.append(str(name))
        self.contexts.append(_operation_context(track, name, detail))
        if is_instruction:
            self.instruction, self.is_inside_fb = detail, name == Op.FB
        try:
            yield
            if is_instruction:  # after an exception they stay, for the location of the error
                self.instruction, self.is_inside_fb = None, False
        finally:
            self.open_span_names.pop()
            self.contexts.pop()

    def record_instant(self, track: TimelineTrack, name: str, detail: object = None) -> None:
        """See `SpanRecorder`."""

    @property
    def current_instruction(self) -> str:
        """Text of the current instruction; outside of instructions, the phase."""
        return self.contexts[-1].phase if self.instruction is None else str(self.instruction)

    @property
    def innermost_span_name(self) -> str:
        """Name of the innermost span; outside of spans, the phase."""
        return self.open_span_names[-1] if self.open_span_names else self.contexts[-1].phase

    @property
    def is_inside_dispatch(self) -> bool:
        """True inside a dispatch, where the host may read its sizes."""
        return any(_DISPATCH.search(name) for name in self.open_span_names)


_INSTRUCTIONS = frozenset(Op)


def _operation_context(track: TimelineTrack, name: str, detail: object) -> OperationContext:
    if track in (TimelineTrack.P2P_NEXT, TimelineTrack.P2P_PREV):
        return OperationContext("messages", "")
    if track is TimelineTrack.REDUCE:
        return OperationContext(name.partition(",")[0], "")
    found = _PHASE_OF_LAYER.match(name)
    if found is not None:
        return OperationContext(found["phase"], found["layer"])
    return OperationContext(str(name), detail.layer if isinstance(detail, ExchangeLabel) else "")
