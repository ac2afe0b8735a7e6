"""Tasks of a preparation: which files, or which piece of a file, are tokenized together.

The tasks depend on the files alone, so any number of workers gives the same parts, and a new file leaves the tasks of
the others as they are.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..formats import ByteRange, is_cuttable
from ..storage import StoredFile

TASK_BYTES = 2**28
"""Plain JSONL is cut into pieces of this size, so that one large file occupies all workers and a kill loses little."""
MAX_UNGROUPED_FILES = 1024
"""Up to this number of files each is a task of its own; a corpus of millions of small ones needs fewer parts."""
_SMALL_FILE, _GROUP_BYTES, _GROUP_FILES = 2**20, 2**26, 4096
_MEAN_GROUP = 256


@dataclass(frozen=True)
class CorpusFile:
    """A file of the corpus with its split."""

    stored: StoredFile
    is_validation: bool
    is_token_file: bool = False


@dataclass(frozen=True)
class Task:
    """Files that are tokenized together, all of one split; or a piece of one file."""

    files: tuple[StoredFile, ...]
    is_validation: bool
    part: ByteRange | None = None
    is_token_file: bool = False
    """True: the only file holds tokens of another program, which are read in place."""

    @property
    def name(self) -> str:
        """Name of the task and of its output: 16 hexadecimal digits, equal for equal file names and pieces."""
        piece = None if self.part is None else [self.part.start, self.part.stop]
        text = json.dumps([[file.name for file in self.files], self.is_validation, piece])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def bytes(self) -> int:
        """Bytes that the task reads."""
        return sum(file.bytes for file in self.files) if self.part is None else self.part.stop - self.part.start


def plan_tasks(files: Sequence[CorpusFile], task_bytes: int = TASK_BYTES) -> tuple[Task, ...]:
    """Return the tasks of `files` in the order of their file names, in which their tokens follow each other."""
    may_group = len(files) > MAX_UNGROUPED_FILES
    small = [file for file in files if may_group and file.stored.bytes < _SMALL_FILE and not file.is_token_file]
    chosen = set(small)
    large = [file for file in files if file not in chosen]
    tasks = [task for file in large for task in _pieces(file, task_bytes)]
    for is_validation in (False, True):
        tasks += _groups([file.stored for file in small if file.is_validation == is_validation], is_validation)
    return tuple(sorted(tasks, key=lambda task: (task.files[0].name, 0 if task.part is None else task.part.start)))


def _pieces(file: CorpusFile, task_bytes: int) -> Iterator[Task]:
    stored = file.stored
    if not is_cuttable(stored) or stored.bytes <= task_bytes:
        yield Task((stored,), file.is_validation, is_token_file=file.is_token_file)
        return
    for start in range(0, stored.bytes, task_bytes):
        part = ByteRange(start, min(start + task_bytes, stored.bytes))
        yield Task((stored,), file.is_validation, part)


def _groups(files: Sequence[StoredFile], is_validation: bool) -> Iterator[Task]:
    """Group small files. A group ends after a file whose name's hash says so, so that a new file changes one group."""
    group: list[StoredFile] = []
    size = 0
    for file in files:
        group.append(file)
        size += file.bytes
        ends = int.from_bytes(hashlib.sha256(file.name.encode()).digest()[:8], "little") % _MEAN_GROUP == 0
        if ends or len(group) == _GROUP_FILES or size >= _GROUP_BYTES:
            yield Task(tuple(group), is_validation)
            group, size = [], 0
    if group:
        yield Task(tuple(group), is_validation)
