"""`manifest.json`: the tensors of a checkpoint, their places in files, and the SHA-256 of every piece."""

import errno
import hashlib
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from ...comm.errors import ConfigError, Problem
from ...comm.files.file_io import read_regular_file, read_text
from ...comm.files.ranges import FILE_NAME
from ...comm.files.strict_json import JsonValue, MalformedFileError, UnsupportedFormatError, parse_json
from ..data.manifest import FileEntry
from .tensor_file import DTYPE_BY_NAME, NAME_BY_DTYPE, TensorSpec, parse_dtype

FORMAT_VERSION = 4
# JSON, unlike the pickle of torch DCP (format 1): reading it runs no code. Up to format 3, `metadata` was `facts`.
MANIFEST_FILE = "manifest.json"
COMPLETE_MARKER_FILE = "complete"
"""File with the SHA-256 of the manifest; written last."""
_MARKER_BYTES = 1000


class CheckpointDamaged(Exception):  # noqa: N818 -- says what it is
    """Error for a checkpoint that does not hold what was saved; the message names the file and the damage."""


@contextmanager
def damage_error_context(hint: str, field: str = "checkpoint") -> Iterator[None]:
    """Turn a `CheckpointDamaged` into a `ConfigError` about `field`; `hint` says what to do."""
    try:
        yield
    except CheckpointDamaged as damaged:
        raise ConfigError([Problem(field, str(damaged), hint)]) from damaged


class StoredPiece(NamedTuple):
    """Contiguous range of a tensor's flattened elements, and the place of its bytes; in JSON a list in this order."""

    file: str
    byte_offset: int
    """First byte in the file."""
    element_offset: int
    """First element in the tensor."""
    num_elements: int
    sha256: str


@dataclass(frozen=True)
class StoredTensor:
    """Tensor and its pieces in order."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[StoredPiece, ...]


@dataclass(frozen=True)
class ManifestHead:
    """Head of a manifest, before its list of tensors."""

    metadata: Mapping[str, Any]
    """Step, configuration, data position, totals of the ledger: see `trainer/run/checkpointing.py`."""
    tensor_files: Mapping[str, int]
    """Sizes of the tensor files in bytes, by name."""
    attachments: tuple[FileEntry, ...]
    """Other files, such as `tokenizer.json`."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.file_sizes.values())

    @property
    def file_sizes(self) -> dict[str, int]:
        """Bytes of every file."""
        return {**self.tensor_files, **{entry.file: entry.bytes for entry in self.attachments}}


HeadT = TypeVar("HeadT", bound=ManifestHead)


@dataclass(frozen=True)
class ManifestSummary(ManifestHead):
    """Manifest without the list of tensors, for listings of checkpoints."""

    num_tensors: int


@dataclass(frozen=True)
class CheckpointManifest(ManifestHead):
    """Everything about a checkpoint except the tensors' bytes."""

    tensors: Mapping[str, StoredTensor]

    def to_json(self) -> str:
        """Return the text of the file. Raises `ValueError` for NaN or Inf in the metadata."""
        tree = {
            "format": FORMAT_VERSION,
            "metadata": self.metadata,
            "files": self.tensor_files,
            "attachments": [asdict(entry) for entry in self.attachments],
            "tensors": {
                name: [NAME_BY_DTYPE[tensor.dtype], tensor.shape, tensor.pieces]
                for name, tensor in sorted(self.tensors.items())
            },
        }
        return json.dumps(tree, separators=(",", ":"), allow_nan=False)


def parse_manifest(raw: bytes) -> CheckpointManifest:
    """Parse the text that `to_json` writes. Raises `MalformedFileError` for anything else."""
    tree = parse_json(raw)
    head = _head(tree, "tensors")
    tensors = {name: _tensor(each) for name, each in tree["tensors"].items()}
    _check_places(tree["tensors"], tensors, head.tensor_files)
    return CheckpointManifest(head.metadata, head.tensor_files, head.attachments, tensors)


def _head(tree: JsonValue, *other_keys: str) -> ManifestHead:
    """Parse all but the tensors; `other_keys` may be there too."""
    found, metadata = tree["format"].value, tree.value.get("metadata")
    if found != FORMAT_VERSION or type(found) is not int:
        writer = metadata.get("version") if isinstance(metadata, dict) else None
        raise UnsupportedFormatError("checkpoint", found, FORMAT_VERSION, writer)
    tree.reject_unknown_keys(("format", "metadata", "files", "attachments", *other_keys))
    sizes = tree["files"].items()
    files = {JsonValue(name, size.location).as_text_in(FILE_NAME): size.as_integer() for name, size in sizes}
    attachments = tuple(_attachment(entry, files) for entry in tree["attachments"].as_list())
    if len({entry.file for entry in attachments}) < len(attachments):
        raise tree["attachments"].malformed_error("names a file twice")
    return ManifestHead(tree["metadata"].as_mapping(), files, attachments)


def merge_rank_records(
    records: Iterable[Mapping[str, Any]],
    metadata: Mapping[str, Any],
    attachments: Iterable[FileEntry],
) -> CheckpointManifest:
    """Merge the records of all ranks into one manifest. Raises `ValueError` if an element is missing or doubled."""
    dtypes: dict[str, tuple[str, tuple[int, ...]]] = {}
    pieces: dict[str, list[StoredPiece]] = {}
    files: dict[str, int] = {}
    for each in records:
        files[each["file"]] = each["bytes"]
        for name, dtype, shape, piece in each["pieces"]:
            kind = dtype, tuple(shape)
            if dtypes.setdefault(name, kind) != kind:
                raise ValueError(f"{name} is {dtypes[name]} on one rank and {kind} on another")
            pieces.setdefault(name, []).append(StoredPiece(*piece))
    tensors = {}
    for name, (dtype, shape) in dtypes.items():
        ordered = tuple(sorted(pieces[name], key=lambda piece: piece.element_offset))
        end, has_gap = _contiguous_end(ordered)
        if has_gap:
            raise ValueError(f"{name}: element {end} was saved by no rank, or by two")
        if end != math.prod(shape):
            raise ValueError(f"{name}: elements from {end} on were saved by no rank")
        tensors[name] = StoredTensor(DTYPE_BY_NAME[dtype], shape, ordered)
    return CheckpointManifest(metadata, files, tuple(attachments), tensors)


def make_rank_record(file: str, size: int, pieces: Iterable[tuple[TensorSpec, StoredPiece]]) -> dict[str, Any]:
    """Return one rank's description of its file, as plain values for `merge_rank_records`."""
    described = [(whole.name, NAME_BY_DTYPE[whole.dtype], whole.shape, piece) for whole, piece in pieces]
    return {"file": file, "bytes": size, "pieces": described}


def read_manifest(directory: Path, *, check_sizes: bool = True) -> CheckpointManifest:
    """Read the manifest of a complete checkpoint and, unless `check_sizes` is False, check the sizes of its files.

    Raises `CheckpointDamaged`, `ConfigError` for another format version, and `OSError` for an unreadable file.
    """
    return _read(directory, parse_manifest, check_sizes=check_sizes)


def _read(directory: Path, parse: Callable[[bytes], HeadT], *, check_sizes: bool = True) -> HeadT:
    """Return `parse` of the manifest's text after checking its hash against the marker."""
    file = directory / COMPLETE_MARKER_FILE
    try:
        marker = read_text(file, _MARKER_BYTES).strip()
        file = directory / MANIFEST_FILE
        raw = read_regular_file(file)
        if hashlib.sha256(raw).hexdigest() != marker:
            raise CheckpointDamaged(f"{file}: its SHA-256 is not that in {COMPLETE_MARKER_FILE}")
        head = parse(raw)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointDamaged(f"{error.filename}: is missing") from error
    except UnsupportedFormatError as error:
        raise error.to_config_error(file) from error
    except MalformedFileError as error:
        raise CheckpointDamaged(f"{file}: {error}") from error
    except OSError as error:
        if error.errno != errno.ELOOP:  # a symbolic link to itself: permanent, unlike other read errors
            raise
        raise CheckpointDamaged(f"{file}: {error.strerror}") from error
    for _, words in find_wrong_file_sizes(directory, head.file_sizes if check_sizes else {}):
        raise CheckpointDamaged(words)
    return head


def find_wrong_file_sizes(directory: Path, sizes: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Yield (name, description) of each file that is missing or has another size than in `sizes`."""
    for name, size in sizes.items():
        path = directory / name
        if not path.is_file():
            yield name, f"{path}: is missing" if not path.exists() else f"{path}: is no regular file"
        elif path.stat().st_size != size:
            yield name, f"{path}: has {path.stat().st_size} bytes instead of {size}"


def read_manifest_summary(directory: Path) -> ManifestSummary:
    """Read the summary of a complete checkpoint with the checks of `read_manifest`, without parsing the tensors.

    Raises `CheckpointDamaged`, `ConfigError` and `OSError` like `read_manifest`.
    """
    # The hash in the marker proves that the manifest is as written, and `to_json` writes the tensors last.
    return _read(directory, _parse_summary)


def _parse_summary(raw: bytes) -> ManifestSummary:
    """Return the summary of a manifest's text."""
    begin = raw.find(_TENSORS)
    head: ManifestHead
    try:
        if begin < 0:
            raise MalformedFileError("tensors", None, "does not stand last")
        head, tensors = _head(parse_json(raw[:begin] + b"}")), raw.count(b'":["', begin)
    except MalformedFileError:  # not as this version writes it
        head = manifest = parse_manifest(raw)
        tensors = len(manifest.tensors)
    return ManifestSummary(head.metadata, head.tensor_files, head.attachments, tensors)


_TENSORS = b',"tensors":{'


def _contiguous_end(pieces: tuple[StoredPiece, ...]) -> tuple[int, bool]:
    """Return the number of elements and False; or the first element in no piece or in two, and True."""
    end = 0
    for piece in pieces:
        if piece.element_offset != end:
            return min(end, piece.element_offset), True
        end += piece.num_elements
    return end, False


def _tensor(item: JsonValue) -> StoredTensor:
    parts = item.as_list()
    if len(parts) != 3:
        raise item.malformed_error("must be a dtype, a shape and pieces")
    shape = tuple(size.as_integer() for size in parts[1].as_list())
    pieces = tuple(_piece(each, f"{item.location}[2][{index}]") for index, each in enumerate(_plain_list(parts[2])))
    end, has_gap = _contiguous_end(pieces)
    if has_gap:
        raise parts[2].malformed_error(f"element {end} is in no piece, or in two")
    if end != math.prod(shape) or not pieces:
        raise parts[2].malformed_error(f"pieces hold {end} elements where the shape {list(shape)} asks for others")
    return StoredTensor(parse_dtype(parts[0]), shape, pieces)


def _plain_list(item: JsonValue) -> list[Any]:
    if not isinstance(item.value, list):
        raise item.malformed_error("must be a list")
    return item.value


def _piece(tree: object, where: str) -> StoredPiece:
    """Parse one piece. Raises `MalformedFileError`."""
    # A large run has hundreds of thousands of pieces: a valid one takes the short path.
    match tree:
        case [str(file), int(begin), int(first), int(elements), str(sha256)] if (
            type(begin) is type(first) is type(elements) is int and min(begin, first, elements) >= 0
        ):
            return StoredPiece(file, begin, first, elements, sha256)
    hint = "must be a file, its first byte, the first element, the number of elements, and a SHA-256"
    raise MalformedFileError(where, tree, hint)


def _attachment(item: JsonValue, files: Mapping[str, int]) -> FileEntry:
    entry = item.as_dataclass(FileEntry)
    if entry.file in (*files, MANIFEST_FILE, COMPLETE_MARKER_FILE):
        raise item["file"].malformed_error("is also a tensor file or the manifest")
    return entry


def _check_places(item: JsonValue, tensors: Mapping[str, StoredTensor], files: Mapping[str, int]) -> None:
    """Check that every piece is inside a file of the manifest and overlaps no other. Raises `MalformedFileError`."""
    ranges_by_file: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for name, tensor in tensors.items():
        for piece in tensor.pieces:
            end = piece.byte_offset + piece.num_elements * tensor.dtype.itemsize
            if piece.file not in files:
                raise item[name].malformed_error(f"a piece lies in {piece.file!r}, which the manifest does not list")
            if end > files[piece.file]:
                raise item[name].malformed_error(f"a piece passes the end of {piece.file}: {files[piece.file]} bytes")
            ranges_by_file[piece.file].append((piece.byte_offset, end, name))
    for ranges in ranges_by_file.values():
        ranges.sort()
        for (_, end, _), (begin, _, name) in itertools.pairwise(ranges):
            if begin < end:
                raise item[name].malformed_error("a piece lies on bytes of another tensor")
