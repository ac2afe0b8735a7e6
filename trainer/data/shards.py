"""Shards: the tokens of a split in files of limited size, written once.

Shapes: T tokens of a range, M documents, P parts.
"""

import bisect
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ...comm.errors import ConfigError, Problem, collect_problems, raise_if_any
from ...comm.files.file_io import config_error_context, open_regular_file, read_regular_file
from .files import HashedFileWriter
from .manifest import DataManifest, DataPart, FileEntry, SplitPart
from .shard_files import ShardFileReader
from .verified_files import read_verified_files

Int64Array = npt.NDArray[np.int64]

TOKENS_PER_SHARD = 2**27
"""Default size of a shard: 256 MiB of uint16."""


class SplitPartWriter:
    """Writer of one part of one split, document by document, into shards in a directory."""

    def __init__(self, directory: Path, name: str, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self._directory = directory
        self._name = name
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._shards: list[HashedFileWriter] = []
        self._starts = HashedFileWriter(directory / f"{name}.documents")
        self._tokens = self._documents = self._text_bytes = 0

    def close(self) -> None:
        """Sync the files to disk and close them; a second call does nothing."""
        for file in (*self._shards, self._starts):
            file.close()

    def add_documents(self, documents: Sequence[npt.NDArray[Any]], text_bytes: int) -> None:
        """Append the tokens of documents, each with its end token; `text_bytes` is the size of their texts."""
        if not documents:
            return
        ends_M = np.cumsum([len(tokens_T) for tokens_T in documents], dtype=np.int64)
        starts_M = np.concatenate((np.zeros(1, dtype=np.int64), ends_M[:-1])) + self._tokens
        self._starts.write(starts_M.astype("<i8").tobytes())
        self._documents += len(documents)
        self._text_bytes += text_bytes
        self._add_tokens(np.concatenate(documents).astype(self._dtype, copy=False))

    def _add_tokens(self, tokens_T: npt.NDArray[Any]) -> None:
        while len(tokens_T):
            room = -self._tokens % self._shard_tokens
            if room == 0:
                self._open_next()
                room = self._shard_tokens
            self._shards[-1].write(tokens_T[:room].tobytes())
            self._tokens += len(tokens_T[:room])
            tokens_T = tokens_T[room:]

    def finish(self) -> SplitPart | None:
        """Sync the part to disk and return its entry; None without documents."""
        self.close()
        if self._documents == 0:
            return None
        return SplitPart(
            tokens=self._tokens,
            documents=self._documents,
            bytes=self._text_bytes,
            shards=tuple(shard.entry for shard in self._shards),
            starts=self._starts.entry,
        )

    def _open_next(self) -> None:
        if self._shards:
            self._shards[-1].close()
        self._shards.append(HashedFileWriter(self._directory / f"{self._name}.{len(self._shards):05d}.bin"))


class ShardReader(Protocol):
    """Reader of the shards of one split by number."""

    def read_tokens(self, number: int, first: int, count: int) -> npt.NDArray[Any]:
        """Return tokens `first` to `first + count` (excluded) of shard `number`."""
        ...


@dataclass(frozen=True)
class TokenSplit:
    """Tokens of one split as one sequence across its shards."""

    name: str
    """`train` or `validation`."""
    shard_starts: Sequence[int]
    """First token of each shard, and the length of the sequence."""
    shard_reader: ShardReader
    """Reader of the shards."""

    @property
    def num_tokens(self) -> int:
        """Length of the sequence."""
        return self.shard_starts[-1]

    def read_tokens(self, start: int, stop: int) -> Int64Array:
        """Return tokens `start` to `stop` (excluded) as int64 [T]. Raises `DataChanged` for a changed shard."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"{self.name}: tokens {start} to {stop} of {self.num_tokens}")
        tokens_T = np.empty(stop - start, dtype=np.int64)
        position, number = start, bisect.bisect_right(self.shard_starts, start) - 1
        while position < stop:
            first, end = self.shard_starts[number], self.shard_starts[number + 1]
            count = min(stop, end) - position
            found_T = self.shard_reader.read_tokens(number, position - first, count)
            tokens_T[position - start : position - start + count] = found_T
            position, number = position + count, number + 1
        return tokens_T


def open_split(directory: Path, manifest: DataManifest, parts: Sequence[DataPart], name: str) -> TokenSplit:
    """Open a split without reading a token. Raises `ConfigError` for missing or truncated files."""
    entries: list[FileEntry] = []
    dtypes: list[np.dtype[Any]] = []
    starts, settings = [0], manifest.settings
    for part in parts:
        if (found := part.split(name)) is None:
            continue
        entries += part.shards(name)
        dtypes += [settings.numpy_dtype if part.dtype is None else np.dtype(part.dtype)] * len(found.shards)
        first, limit = starts[-1], settings.shard_tokens if part.folder is None else found.tokens
        starts += [first + min(limit * number, found.tokens) for number in range(1, len(found.shards) + 1)]
    raise_if_any(_size_problems(directory, entries))
    reader = ShardFileReader(directory, entries, dtypes, read_verified_files(directory))
    return TokenSplit(name, starts, reader)


def read_document_starts(directory: Path, parts: Sequence[DataPart], name: str) -> Iterator[Int64Array]:
    """Yield the document starts of split `name`, part by part: int64 [M], counted in tokens of the whole split.

    The arrays of one part at a time are in memory. Raises `ConfigError` for a damaged file.
    """
    before = 0
    for part in parts:
        if (found := part.split(name)) is not None:
            yield _read_starts(directory / found.starts.file, found) + before
            before += found.tokens


def _read_starts(path: Path, part: SplitPart) -> Int64Array:
    with config_error_context(path, _FIX, unreadable_fix="make it readable"):
        raw = read_regular_file(path, part.starts.bytes)
    starts_M: Int64Array = np.frombuffer(raw[: len(raw) // 8 * 8], dtype="<i8").astype(np.int64, copy=False)
    ends_M = np.append(starts_M[1:], part.tokens)
    if not (len(raw) == 8 * part.documents and starts_M[0] == 0 and (starts_M < ends_M).all()):
        hint = f"must hold {part.documents} rising document starts in {part.tokens} tokens: {_PREPARE_AGAIN}"
        raise ConfigError([Problem(str(path), starts_M.shape, hint)])
    return starts_M


def verify_file_hashes(directory: Path, files: Sequence[FileEntry]) -> None:
    """Read every byte of `files`. Raises `ConfigError` with each that is missing, truncated or changed."""
    problems = list(_size_problems(directory, files))
    damaged = {problem.field for problem in problems}
    for entry in files:
        path = directory / entry.file
        if str(path) in damaged:
            continue
        unreadable = config_error_context(path, _FIX, unreadable_fix="make it readable")
        with collect_problems(problems), unreadable, open_regular_file(path) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != entry.sha256:
                problems.append(Problem(str(path), found, f"must have SHA-256 {entry.sha256}: {_PREPARE_AGAIN}"))
    raise_if_any(problems)


_FIX = "remove the directory and prepare again"
_PREPARE_AGAIN = f"the file is damaged; {_FIX}"


def _size_problems(directory: Path, files: Sequence[FileEntry]) -> Iterator[Problem]:
    for entry in files:
        path = directory / entry.file
        if not path.is_file():
            what = "is no regular file" if path.exists() else "is missing"
            yield Problem(str(path), None, f"{what}; {_FIX}")
        elif path.stat().st_size != entry.bytes:
            yield Problem(str(path), path.stat().st_size, f"must have {entry.bytes} bytes: {_PREPARE_AGAIN}")
