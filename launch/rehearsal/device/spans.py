"""The recorder of a rehearsed rank: what runs now, by instruction, phase and layer."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import TracebackType

from ....comm.trace import EDGE_WAIT, EXPOSED_EXCHANGE, ExchangeLabel, Track
from ....parallelism.pipeline.program import Op

_OF = re.compile(r"^(?P<phase>.+?) of (?P<layer>\w+), micro-batch \d+$")
_DISPATCH = re.compile(r"\bdispatch of \w+, micro-batch \d+")
_NOTHING: AbstractContextManager[object] = nullcontext()


@dataclass(frozen=True)
class OperationPlace:
    """What an operation belongs to."""

    phase: str
    layer: str


class Spans:
    """Implements `comm.trace.SpanRecorder`. Spans of all tracks are one stack: a rehearsal has one thread."""

    def __init__(self, phase: str) -> None:
        """`phase` is where no span is open."""
        self.phases = [OperationPlace(phase, "")]
        self.names: list[str] = []
        """Open spans, the innermost last."""
        self.instruction: object = None
        self.is_pair = False
        """Whether an FB runs."""

    def begin(self, phase: str) -> None:
        """Name what runs from here on where no span is open."""
        self.phases[0] = OperationPlace(phase, "")

    def span(self, track: Track, name: str, detail: object = None) -> AbstractContextManager[object]:
        """See `SpanRecorder`."""
        if name in (EXPOSED_EXCHANGE, EDGE_WAIT):
            return _NOTHING
        return _Span(self, track, name, detail)

    def mark(self, track: Track, name: str, detail: object = None) -> None:
        """See `SpanRecorder`."""

    @property
    def where(self) -> str:
        """The instruction that runs, in words; before and after all of them, the phase."""
        return self.phases[-1].phase if self.instruction is None else str(self.instruction)

    @property
    def what(self) -> str:
        """The innermost span."""
        return self.names[-1] if self.names else self.phases[-1].phase

    @property
    def is_dispatch(self) -> bool:
        """Whether the sizes of a dispatch may be read."""
        return any(_DISPATCH.search(name) for name in self.names)


class _Span:
    """One span: open from `__enter__` to `__exit__`."""

    def __init__(self, spans: Spans, track: Track, name: str, detail: object) -> None:
        self._spans, self._track, self._name, self._detail = spans, track, name, detail

    def __enter__(self) -> None:
        spans = self._spans
        spans.names.append(str(self._name))
        spans.phases.append(_place(self._track, self._name, self._detail))
        if self._track is Track.INSTRUCTION and self._name in _INSTRUCTIONS:
            spans.instruction, spans.is_pair = self._detail, self._name == Op.FB

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        spans = self._spans
        spans.names.pop()
        spans.phases.pop()
        if error is None and self._track is Track.INSTRUCTION and self._name in _INSTRUCTIONS:
            spans.instruction, spans.is_pair = None, False


_INSTRUCTIONS = frozenset(Op)


def _place(track: Track, name: str, detail: object) -> OperationPlace:
    if track in (Track.UP, Track.DOWN):
        return OperationPlace("messages", "")
    if track is Track.REDUCE:
        return OperationPlace(name.partition(",")[0], "")
    found = _OF.match(name)
    if found is not None:
        return OperationPlace(found["phase"], found["layer"])
    return OperationPlace(str(name), detail.layer if isinstance(detail, ExchangeLabel) else "")
