"""CPU streams whose copies run immediately, or as late as a GPU may run them: when the host waits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from shoestring.comm.streams import Stream

HOST = "computing"


class _Later(TorchFunctionMode):
    """A tensor whose `copy_` is queued."""

    def __init__(self, queue: list[Callable[[], object]]) -> None:
        super().__init__()
        self._queue = queue

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.copy_:
            return func(*args, **(kwargs or {}))
        self._queue.append(lambda: func(*args, **(kwargs or {})))
        return args[0]


@dataclass
class LateEvent:
    name: str
    streams: "LateStreams"
    queued: list[Callable[[], object]] = field(default_factory=list)

    def synchronize(self) -> None:
        self.streams.log.append(f"host waits for {self.name}")
        while self.queued:
            self.queued.pop(0)()


@dataclass
class LateStream:
    name: str
    streams: "LateStreams"
    queue: list[Callable[[], object]] = field(default_factory=list)
    events: int = 0

    def record_event(self) -> LateEvent:
        self.events += 1
        event = LateEvent(f"{self.name} {self.events}", self.streams, self.queue)
        self.queue = []
        self.streams.log.append(event.name)
        return event

    def wait_event(self, event: LateEvent) -> None:
        self.streams.log.append(f"{self.name} waits for {event.name}")

    def synchronize(self) -> None:
        raise AssertionError("a stream is waited for by its events")


@dataclass
class LateStreams:
    """Streams that log every event in order, when it is recorded and when it is waited for."""

    late: bool = True
    log: list[str] = field(default_factory=list)

    def create_stream(self, name: str) -> LateStream:
        return LateStream(name, self)

    def current_stream(self) -> LateStream:
        return LateStream(HOST, self)

    @contextmanager
    def use_stream(self, stream: Stream) -> Iterator[object]:
        assert isinstance(stream, LateStream)
        if not self.late:
            yield None
            return
        with _Later(stream.queue):
            yield None

    def record_stream(self, tensor: torch.Tensor, stream: Stream) -> None:
        raise AssertionError("the masters live as long as the run")
