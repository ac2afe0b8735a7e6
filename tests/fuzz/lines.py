"""Which lines of the readers were run, counted by the interpreter's own trace."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

READERS = (
    *("comm/strict.py", "comm/strict_yaml.py", "comm/files.py"),
    *("trainer/checkpoint/tensor_file.py", "trainer/checkpoint/manifest.py", "trainer/checkpoint/opened.py"),
    *("trainer/data/manifest.py", "trainer/data/corpus.py", "trainer/data/tokenizer.py", "trainer/data/shards.py"),
    *("trainer/huggingface/config.py", "trainer/huggingface/importing.py", "trainer/huggingface/tokenizer.py"),
    *("trainer/budget/records.py", "trainer/budget/journal.py"),
    *("trainer/telemetry/lines.py", "trainer/telemetry/history.py", "launch/typed.py"),
)
"""Files that read what others may have written."""
_NO_READERS = (
    *("Journal.", "cut_torn_line", "replace_file", "refuse_links", "record", "plain"),  # write, for runs that go on
    *("TensorFileWriter.", "_header", "as_bytes", "merge", "_check_whole", "_tensor_tree", "SplitWriter."),
    *("Checkpoint.averaged", "Manifest.to_json", "train_tokenizer", "fingerprint", "config_json", "_unknown_there"),
)
"""Beginnings of functions in these files that write, or make a file and read none of others."""


def lines_of(path: Path) -> set[int]:
    """Lines of the functions in a file, without their heads."""
    found: set[int] = set()
    for code in _codes(compile(path.read_text(), str(path), "exec")):
        if code.co_flags & inspect.CO_NEWLOCALS and not code.co_qualname.startswith(_NO_READERS):
            found |= {line for _, _, line in code.co_lines() if line is not None and line != code.co_firstlineno}
    return found


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


class Lines:
    """The lines of `READERS` that run while it is on."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, int]] = set()
        self._names: dict[CodeType, str | None] = {}
        self._readers = {str(ROOT / name): name for name in READERS}

    def start(self) -> None:
        """Count from here on, in this thread."""
        sys.settrace(self._call)

    def _call(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        code = frame.f_code
        if code not in self._names:
            self._names[code] = self._readers.get(os.path.realpath(code.co_filename))
        return None if self._names[code] is None else self._line

    def _line(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        if event == "line":
            self.seen.add((str(self._names[frame.f_code]), frame.f_lineno))
        return self._line


def coverage(seen: set[tuple[str, int]]) -> dict[str, tuple[int, int, list[int]]]:
    """Of each reader: lines run, lines there, and those that were not run."""
    found = {}
    for name in READERS:
        lines = lines_of(ROOT / name)
        missed = sorted(line for line in lines if (name, line) not in seen)
        found[name] = len(lines) - len(missed), len(lines), missed
    return found
