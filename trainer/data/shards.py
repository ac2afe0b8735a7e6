"""Shards: the tokens of a split in files of limited size, written once.

Shapes: T tokens of a range, M documents.
"""

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ...comm.errors import ConfigError, Problem, collect_problems, raise_if_any
from ...comm.files.file_io import config_error_context, open_regular_file, os_error_to_problem, read_regular_file
from .files import HashedFileWriter, write_file_durably
from .manifest import DataManifest, FileEntry, SplitEntry
from .shard_files import ShardFileReader
from .verified_files import read_verified_files

Int64Array = npt.NDArray[np.int64]

TOKENS_PER_SHARD = 2**27
"""Default size of a shard: 256 MiB of uint16."""


class SplitWriter:
    """Writer of one split, document by document, into shards in a new directory."""

    def __init__(self, directory: Path, name: str, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self._directory = directory
        self._name = name
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._shards: list[HashedFileWriter] = []
        self._starts: list[int] = []
        self._tokens = 0
        self._text_bytes = 0

    def close(self) -> None:
        """Close the shards; needed after an error, and harmless after `finish_split`."""
        for shard in self._shards:
            shard.close()

    def add_document(self, tokens: Sequence[int], text_bytes: int) -> None:
        """Append a document's tokens, including its end token; `text_bytes` is the size of its text."""
        self._starts.append(self._tokens)
        self._text_bytes += text_bytes
        tokens_T = np.asarray(tokens, dtype=self._dtype)
        while len(tokens_T):
            room = -self._tokens % self._shard_tokens
            if room == 0:
                self._open_next()
                room = self._shard_tokens
            self._shards[-1].write(tokens_T[:room].tobytes())
            self._tokens += len(tokens_T[:room])
            tokens_T = tokens_T[room:]

    def finish_split(self) -> SplitEntry:
        """Sync the split to disk and return its manifest entry."""
        self.close()
        buffer = io.BytesIO()
        np.save(buffer, np.asarray(self._starts, dtype="<i8"))
        return SplitEntry(
            tokens=self._tokens,
            documents=len(self._starts),
            bytes=self._text_bytes,
            shards=tuple(shard.entry for shard in self._shards),
            starts=write_file_durably(self._directory / f"{self._name}_documents.npy", buffer.getvalue()),
        )

    def _open_next(self) -> None:
        if self._shards:
            self._shards[-1].close()
        self._shards.append(HashedFileWriter(self._directory / f"{self._name}_{len(self._shards):05d}.bin"))


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
    num_tokens: int
    """Length of the sequence."""
    document_starts_M: Int64Array
    """Start of each document in tokens: int64 [M]."""
    shard_reader: ShardReader
    """Reader of the shards; each but the last holds `shard_tokens` tokens."""
    shard_tokens: int

    def read_tokens(self, start: int, stop: int) -> Int64Array:
        """Return tokens `start` to `stop` (excluded) as int64 [T]. Raises `DataChanged` for a changed shard."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"{self.name}: tokens {start} to {stop} of {self.num_tokens}")
        tokens_T = np.empty(stop - start, dtype=np.int64)
        position = start
        while position < stop:
            index, offset = divmod(position, self.shard_tokens)
            count = min(stop - position, self.shard_tokens - offset)
            tokens_T[position - start : position - start + count] = self.shard_reader.read_tokens(index, offset, count)
            position += count
        return tokens_T


def open_split(directory: Path, manifest: DataManifest, name: str) -> TokenSplit:
    """Open a split without reading a token. Raises `ConfigError` for missing or truncated files."""
    entry = {"train": manifest.train, "validation": manifest.validation}[name]
    dtype = manifest.numpy_dtype
    problems = list(_size_problems(directory, (*entry.shards, entry.starts)))
    limit = manifest.shard_tokens
    count = -(-entry.tokens // limit)  # counted before a list is made: a damaged manifest may ask for any number
    last = entry.tokens - (count - 1) * limit
    expected = [limit * dtype.itemsize] * (min(count, len(entry.shards) + 1) - 1) + [last * dtype.itemsize]
    if count != len(entry.shards) or [shard.bytes for shard in entry.shards] != expected:
        needed = f"{limit * dtype.itemsize} bytes, {count} of them, the last of {last * dtype.itemsize}"
        hint = f"{entry.tokens} {name} tokens in {manifest.dtype} need shards of {needed}; prepare again"
        problems.append(Problem(str(directory), [shard.bytes for shard in entry.shards][:8], hint))
    raise_if_any(problems)
    shards = ShardFileReader(directory, entry.shards, dtype, read_verified_files(directory))
    return TokenSplit(name, entry.tokens, _read_starts(directory / entry.starts.file, entry), shards, limit)


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


def _read_starts(path: Path, entry: SplitEntry) -> Int64Array:
    try:
        # Parsed from memory: a damaged header may ask for any size, but the buffer has only the file's bytes.
        starts_M: Int64Array = np.load(io.BytesIO(read_regular_file(path, entry.starts.bytes)), allow_pickle=False)
    except OSError as error:
        raise ConfigError([os_error_to_problem(error, path, "make it readable")]) from error
    except Exception as error:  # NumPy parses a header as Python: a damaged one may raise any error
        raise ConfigError([Problem(str(path), str(error), f"is not an .npy file: {_PREPARE_AGAIN}")]) from error
    if not isinstance(starts_M, np.ndarray):  # a zip file of several
        raise ConfigError([Problem(str(path), type(starts_M).__name__, f"is not an .npy file: {_PREPARE_AGAIN}")])
    ends_M = np.append(starts_M[1:], entry.tokens) if starts_M.ndim == 1 else starts_M
    is_whole = starts_M.dtype == np.int64 and starts_M.shape == (entry.documents,) and starts_M[:1].tolist() == [0]
    if not (is_whole and (starts_M < ends_M).all()):
        hint = f"must hold {entry.documents} rising document starts in {entry.tokens} tokens: {_PREPARE_AGAIN}"
        raise ConfigError([Problem(str(path), starts_M.shape, hint)])
    return starts_M
