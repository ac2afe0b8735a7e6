"""Code locations: the innermost stack frame in the package, without the rehearsal itself."""

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from traceback import walk_stack, walk_tb
from types import CodeType, FrameType

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


def function_location(frame: FrameType | None) -> str:
    """Return `file:function` of the innermost frame of the package from `frame` outwards."""
    while frame is not None:
        name = _name(frame.f_code)
        if name:
            return name
        frame = frame.f_back
    return AUTOGRAD_LOCATION


def line_location(frame: FrameType) -> str:
    """Return `file:line function` of the innermost frame of the package outside of communication files."""
    return _first_line(walk_stack(frame), _COMMUNICATION_FILES)


def error_location(error: BaseException) -> str:
    """Return `file:line function` of the innermost frame of the package in the traceback of `error`'s cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return _first_line(reversed(list(walk_tb(error.__traceback__))), ())


def _first_line(frames: Iterable[tuple[FrameType, int]], skipped: Sequence[str]) -> str:
    for frame, line in frames:
        file = _file(frame.f_code)
        if file is not None and file not in skipped:
            return f"{file}:{line} {_function(frame.f_code)}"
    return AUTOGRAD_LOCATION


@cache
def _name(code: CodeType) -> str:
    """Return `file:function`, empty for code outside of the package."""
    file = _file(code)
    return "" if file is None else f"{file}:{_function(code)}"


@cache
def _file(code: CodeType) -> str | None:
    """Return the path inside the package; None for its environment, the rehearsal, and other files."""
    path = Path(code.co_filename).resolve()
    if not path.is_relative_to(_PACKAGE):
        return None
    parts = path.relative_to(_PACKAGE).parts
    is_ours = parts[0] in ("comm", "parallelism", "trainer", "launch") and parts[:2] != _REHEARSAL
    return "/".join(parts) if is_ours else None


def _function(code: CodeType) -> str:
    return code.co_qualname.replace("<locals>.", "")
