"""Code locations: the innermost stack frame in the package, without the rehearsal itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType, TracebackType

_PACKAGE = Path(__file__).resolve().parents[3]
_REHEARSAL = ("launch", "rehearsal")
_COMMUNICATION_FILES = (
    "comm/communicator.py",
    "comm/groups.py",
    "comm/host_transfer.py",
    "comm/p2p.py",
    "comm/exchange/permutation.py",
    "comm/async_comm.py",
    "comm/streams.py",
)
"""Files that every communication passes through; the frame that called them is reported instead."""
AUTOGRAD_LOCATION = "autograd"
"""Location of an operation of torch's autograd, whose thread has no frame of the package."""


class CodeLocations:
    """Code locations of stack frames, with a cache by code object."""

    def __init__(self) -> None:
        self._files: dict[CodeType, str | None] = {}
        self._names: dict[CodeType, str] = {}

    def function_location(self, frame: FrameType | None) -> str:
        """Return `file:function` of the innermost frame of the package from `frame` outwards."""
        while frame is not None:
            code = frame.f_code
            name = self._names.get(code)
            if name is None:
                name = self._names[code] = self._name(code)
            if name:
                return name
            frame = frame.f_back
        return AUTOGRAD_LOCATION

    def line_location(self, frame: FrameType | None) -> str:
        """Return `file:line function` of the innermost frame of the package outside of communication files."""
        while frame is not None:
            file = self._file(frame.f_code)
            if file is not None and file not in _COMMUNICATION_FILES:
                return f"{file}:{frame.f_lineno} {_function(frame.f_code)}"
            frame = frame.f_back
        return AUTOGRAD_LOCATION

    def error_location(self, error: BaseException) -> str:
        """Return `file:line function` of the innermost frame of the package in the traceback of `error`'s cause."""
        while error.__cause__ is not None:
            error = error.__cause__
        found = AUTOGRAD_LOCATION
        for frame, line in _traceback_frames(error.__traceback__):
            file = self._file(frame.f_code)
            if file is not None:
                found = f"{file}:{line} {_function(frame.f_code)}"
        return found

    def _name(self, code: CodeType) -> str:
        """Return `file:function`, empty for code outside of the package."""
        file = self._file(code)
        return "" if file is None else f"{file}:{_function(code)}"

    def _file(self, code: CodeType) -> str | None:
        if code not in self._files:
            self._files[code] = _package_path(code.co_filename)
        return self._files[code]


def _package_path(filename: str) -> str | None:
    """Return the path inside the package; None for its environment, the rehearsal, and other files."""
    path = Path(filename).resolve()
    if not path.is_relative_to(_PACKAGE):
        return None
    parts = path.relative_to(_PACKAGE).parts
    is_ours = parts[0] in ("comm", "parallelism", "trainer", "launch") and parts[:2] != _REHEARSAL
    return "/".join(parts) if is_ours else None


def _function(code: CodeType) -> str:
    return code.co_qualname.replace("<locals>.", "")


def _traceback_frames(trace: TracebackType | None) -> Iterator[tuple[FrameType, int]]:
    while trace is not None:
        yield trace.tb_frame, trace.tb_lineno
        trace = trace.tb_next
