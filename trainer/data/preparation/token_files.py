"""Token files that are read in place: Megatron's `.bin` with `.idx`, datatrove's `.ds` with `.ds.index`.

Both are the tokens of all documents without a header, and an index of the documents. Formats: Megatron-LM's
indexed_dataset.py, and tokenizer.py of datatrove's pipeline.

Shapes: T tokens of a block, M documents, Q sequences (Megatron may cut a document into several).
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ....comm.errors import ConfigError, Problem
from ....comm.files.file_io import config_error_context, open_regular_file, read_regular_file
from ....comm.files.strict_json import MalformedFileError
from ..manifest import FileEntry
from ..storage import StoredFile, is_url, local_path

Int64Array = npt.NDArray[np.int64]

_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_DTYPES = {4: "<i4", 5: "<i8", 8: "<u2"}
"""Dtypes of token ids by their codes; the others are too narrow or are no integers."""
_INDEX_SUFFIX = {".bin": ".idx", ".ds": ".ds.index"}
_COMPANIONS = (".idx", ".ds.index", ".ds.metadata")
_BLOCK_BYTES = 2**26
_FIX = "write it again with its program"


@dataclass(frozen=True)
class TokenFile:
    """A token file, read to its end once."""

    entry: FileEntry
    dtype: str
    """Dtype of its tokens, as NumPy writes it."""
    starts_M: Int64Array
    """First token of each document."""
    tokens: int
    largest_token: int
    documents_with_end: int
    """Documents whose last token is the end token."""


def is_token_file(name: str, names: frozenset[str]) -> bool:
    """Return True for a token file that has its index among `names`."""
    suffix = Path(name).suffix
    return suffix in _INDEX_SUFFIX and name.removesuffix(suffix) + _INDEX_SUFFIX[suffix] in names


def is_companion(name: str, names: frozenset[str]) -> bool:
    """Return True for the index or the metadata of a token file among `names`."""
    stems = [name.removesuffix(end) for end in _COMPANIONS if name.endswith(end)]
    return any(is_token_file(stem + suffix, names) for stem in stems for suffix in _INDEX_SUFFIX)


def read_token_file(file: StoredFile, eos_token_id: int) -> TokenFile:
    """Read index and tokens of `file`. Raises `ConfigError` for a bucket, and for an index that does not fit."""
    if is_url(file.url):
        hint = "is a token file in a bucket, and these are read in place: copy it to a disk"
        raise ConfigError([Problem("data.corpus", file.url, hint)])
    path, index = local_path(file.url), _index_path(file)
    with config_error_context(index, _FIX):
        raw = read_regular_file(index, index.stat().st_size)
        parse = _parse_megatron if path.suffix == ".bin" else _parse_datatrove
        dtype, lengths_M = parse(raw, file.bytes)
        tokens = int(lengths_M.sum())
        if (lengths_M < 1).any():
            raise MalformedFileError("", int((lengths_M < 1).sum()), "documents have no token")
        if tokens * np.dtype(dtype).itemsize != file.bytes:
            hint = f"names {tokens} tokens of {dtype}, and {path.name} has {file.bytes} bytes"
            raise MalformedFileError("", len(lengths_M), hint)
    ends_M = np.cumsum(lengths_M)
    with config_error_context(path, _FIX):
        return _scan(path, dtype, ends_M - lengths_M, ends_M, eos_token_id)


def _index_path(file: StoredFile) -> Path:
    path = local_path(file.url)
    return path.with_name(path.name.removesuffix(path.suffix) + _INDEX_SUFFIX[path.suffix])


def index_signature(file: StoredFile) -> str:
    """Return text that changes when the index of a token file does. Raises `ConfigError` if it cannot be read."""
    with config_error_context(_index_path(file), _FIX):
        status = _index_path(file).stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _scan(path: Path, dtype: str, starts_M: Int64Array, ends_M: Int64Array, eos_token_id: int) -> TokenFile:
    digest, largest, position, with_end = hashlib.sha256(), 0, 0, 0
    item = np.dtype(dtype).itemsize
    with open_regular_file(path) as stream:
        while raw := stream.read(_BLOCK_BYTES):
            digest.update(raw)
            tokens_T = np.frombuffer(raw, dtype)
            if int(tokens_T.min()) < 0:
                raise MalformedFileError("", int(tokens_T.min()), "is a negative token id")
            largest = max(largest, int(tokens_T.max()))
            first, last = np.searchsorted(ends_M, (position + 1, position + len(tokens_T) + 1))
            with_end += int((tokens_T[ends_M[first:last] - 1 - position] == eos_token_id).sum())
            position += len(tokens_T)
    entry = FileEntry(path.name, position * item, digest.hexdigest())
    return TokenFile(entry, dtype, starts_M, position, largest, with_end)


def _parse_megatron(raw: bytes, size: int) -> tuple[str, Int64Array]:
    """Return dtype and document lengths of an `.idx` file. Raises `MalformedFileError`."""
    if not raw.startswith(_MEGATRON_MAGIC) or len(raw) < 34:
        raise MalformedFileError("", raw[:9].hex(), "is no index of Megatron")
    code, sequences = raw[17], int.from_bytes(raw[18:26], "little")
    documents = int.from_bytes(raw[26:34], "little")
    if code not in _MEGATRON_DTYPES:
        raise MalformedFileError("dtype", code, f"must be one of {', '.join(map(str, _MEGATRON_DTYPES))}")
    if len(raw) - 34 < 12 * sequences + 8 * documents:
        raise MalformedFileError("", len(raw), f"is cut short: {sequences} sequences, {documents} documents")
    lengths_Q = np.frombuffer(raw, "<i4", sequences, 34).astype(np.int64)
    pointers_Q = np.frombuffer(raw, "<i8", sequences, 34 + 4 * sequences)
    bounds_M = np.frombuffer(raw, "<i8", documents, 34 + 12 * sequences)
    ends_Q = np.cumsum(lengths_Q)
    dtype = _MEGATRON_DTYPES[code]
    if not np.array_equal(pointers_Q, (ends_Q - lengths_Q) * np.dtype(dtype).itemsize):
        raise MalformedFileError("", sequences, "names sequences that do not follow each other in the file")
    if documents < 2 or bounds_M[0] != 0 or bounds_M[-1] != sequences or (np.diff(bounds_M) < 1).any():
        raise MalformedFileError("", documents, "names documents that do not follow each other")
    return dtype, np.diff(np.concatenate((np.zeros(1, np.int64), ends_Q))[bounds_M])


def _parse_datatrove(raw: bytes, size: int) -> tuple[str, Int64Array]:
    """Return dtype and document lengths of a `.ds.index` file. Raises `MalformedFileError`."""
    if not raw or len(raw) % 8:
        raise MalformedFileError("", len(raw), "must hold 8 bytes for each document")
    ends_M = np.frombuffer(raw, "<u8").astype(np.int64)
    for dtype in ("<u2", "<u4"):
        if int(ends_M[-1]) * np.dtype(dtype).itemsize == size:
            return dtype, np.diff(ends_M, prepend=0)
    raise MalformedFileError("", int(ends_M[-1]), f"tokens, of 2 or 4 bytes each, do not fit a file of {size} bytes")
