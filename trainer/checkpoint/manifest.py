"""`manifest.json`: what a checkpoint holds, where, and the SHA-256 of every piece. JSON: reading it runs no code."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from ...comm.errors import ConfigError, Problem
from ...comm.files.access import read_regular, read_text
from ...comm.files.strict_json import Item, Malformed, parse_json
from ..data.manifest import FileEntry
from .tensor_file import DTYPES, NAMES, Declared, read_dtype

FORMAT = 3
"""1 was torch DCP's, whose metadata is a pickle."""
MANIFEST = "manifest.json"
MARKER = "complete"
"""Holds the SHA-256 of the manifest, and is written last."""
_MARKER_BYTES = 1000

T = TypeVar("T")


class Damaged(Exception):  # noqa: N818 -- says what it is
    """A checkpoint that does not hold what was saved; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class StoredPiece:
    """A run of the flattened elements of a tensor, and where its bytes are."""

    file: str
    begin: int
    """First byte in the file."""
    first: int
    """First element in the tensor."""
    elements: int
    sha256: str


@dataclass(frozen=True)
class StoredTensor:
    """A tensor and the pieces that it is made of, in their order."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[StoredPiece, ...]

    def declared(self, name: str) -> Declared:
        """As a file would hold it."""
        return Declared(name, self.dtype, self.shape)


@dataclass(frozen=True)
class CheckpointManifest:
    """Everything about a checkpoint but the tensors' bytes."""

    facts: Mapping[str, Any]
    """Step, configuration, data position, totals of the ledger: see `trainer/run/checkpointing.py`."""
    tensors: Mapping[str, StoredTensor]
    files: Mapping[str, int]
    """Files of tensors, and their sizes in bytes."""
    attachments: tuple[FileEntry, ...]
    """Other files, such as `tokenizer.json`."""

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(self.sizes.values())

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file."""
        return {**self.files, **{entry.file: entry.bytes for entry in self.attachments}}

    def to_json(self) -> str:
        """The text of the file. Raises `ValueError` for a number in `facts` that is not finite: JSON has none."""
        tree = {
            "format": FORMAT,
            "facts": self.facts,
            "files": self.files,
            "attachments": [asdict(entry) for entry in self.attachments],
            "tensors": {name: _tensor_tree(tensor) for name, tensor in sorted(self.tensors.items())},
        }
        return json.dumps(tree, separators=(",", ":"), allow_nan=False)


def parse(raw: bytes) -> CheckpointManifest:
    """The inverse of `to_json`. Raises `Malformed` for anything else, `ConfigError` for another format."""
    tree = parse_json(raw)
    _check_format(tree)
    tree.only(("format", "facts", "files", "attachments", "tensors"))
    files, attachments = _files(tree)
    tensors = {name: _tensor(each) for name, each in tree["tensors"].items()}
    _check_places(tree["tensors"], tensors, files)
    return CheckpointManifest(tree["facts"].mapping(), tensors, files, attachments)


def _check_format(tree: Item) -> None:
    found = tree["format"].value
    if found != FORMAT or type(found) is not int:
        hint = f"this version reads format {FORMAT}; go on with the version that wrote it, or start over"
        raise ConfigError([Problem(MANIFEST, found, hint)])


def _files(tree: Item) -> tuple[dict[str, int], tuple[FileEntry, ...]]:
    files = {_key_name(name, size): size.whole() for name, size in tree["files"].items()}
    attachments = tuple(_attachment(entry, files) for entry in tree["attachments"].list())
    if len({entry.file for entry in attachments}) < len(attachments):
        raise tree["attachments"].malformed("names a file twice")
    return files, attachments


def merge(
    records: Iterable[Mapping[str, Any]],
    facts: Mapping[str, Any],
    attachments: Iterable[FileEntry],
) -> CheckpointManifest:
    """One manifest of what every rank has written, see `record`. Raises `ValueError` unless each tensor is whole."""
    dtypes: dict[str, tuple[str, tuple[int, ...]]] = {}
    pieces: dict[str, list[StoredPiece]] = {}
    files: dict[str, int] = {}
    for each in records:
        files[each["file"]] = each["bytes"]
        for name, (dtype, shape, *piece) in each["pieces"]:
            kind = dtype, tuple(shape)
            if dtypes.setdefault(name, kind) != kind:
                raise ValueError(f"{name} is {dtypes[name]} on one rank and {kind} on another")
            pieces.setdefault(name, []).append(StoredPiece(each["file"], *piece))
    tensors = {}
    for name, (dtype, shape) in dtypes.items():
        ordered = tuple(sorted(pieces[name], key=lambda piece: piece.first))
        _check_whole(name, shape, ordered)
        tensors[name] = StoredTensor(DTYPES[dtype], shape, ordered)
    return CheckpointManifest(facts, tensors, files, tuple(attachments))


def record(file: str, size: int, pieces: Iterable[tuple[Declared, StoredPiece]]) -> dict[str, Any]:
    """What one rank says of its file, as plain values for `merge`."""
    described = [
        (whole.name, (NAMES[whole.dtype], whole.shape, piece.begin, piece.first, piece.elements, piece.sha256))
        for whole, piece in pieces
    ]
    return {"file": file, "bytes": size, "pieces": described}


def read_manifest(directory: Path) -> CheckpointManifest:
    """The manifest of a complete checkpoint, and that its files have their sizes.

    Raises `Damaged`, `ConfigError` for another format, and `OSError` where files are there and cannot be read.
    """
    manifest = read_manifest_alone(directory)
    _check_sizes(directory, manifest.sizes)
    return manifest


def read_manifest_alone(directory: Path) -> CheckpointManifest:
    """The same manifest, whatever became of the files that it lists. Raises like `read_manifest`."""
    return _read(directory, parse)


def _read(directory: Path, take: Callable[[bytes], T]) -> T:
    """What `take` makes of the manifest's text, which has the hash that is in the marker."""
    file = directory / MARKER
    try:
        marker = read_text(file, _MARKER_BYTES).strip()
        file = directory / MANIFEST
        raw = read_regular(file)
        if hashlib.sha256(raw).hexdigest() != marker:
            raise Damaged(f"{file}: its SHA-256 is not that in {MARKER}")
        return take(raw)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Damaged(f"{error.filename}: is missing") from error
    except Malformed as error:
        raise Damaged(f"{file}: {error}") from error
    except OSError as error:
        if error.errno != errno.ELOOP:  # no time mends a link that leads to itself
            raise
        raise Damaged(f"{file}: {error.strerror}") from error
    except ConfigError as refused:
        raise ConfigError(replace(problem, field=str(file)) for problem in refused.problems) from refused


def _check_sizes(directory: Path, sizes: Mapping[str, int]) -> None:
    for _, words in wrong_sizes(directory, sizes):
        raise Damaged(words)


def wrong_sizes(directory: Path, sizes: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Yield each of the files that is missing or has another size than in `sizes`, and words about it."""
    for name, size in sizes.items():
        path = directory / name
        if not path.is_file():
            yield name, f"{path}: is missing" if not path.exists() else f"{path}: is no regular file"
        elif path.stat().st_size != size:
            yield name, f"{path}: has {path.stat().st_size} bytes instead of {size}"


@dataclass(frozen=True)
class ManifestSummary:
    """What a list of checkpoints says of one: its manifest, without its tensors."""

    facts: Mapping[str, Any]
    bytes: int
    """Of all files."""
    files: int
    """Of tensors."""
    tensors: int


def read_outline(directory: Path) -> ManifestSummary:
    """The outline of a complete checkpoint; the same checks as `read_manifest` makes, without parsing the tensors.

    The hash in the marker says that the manifest is as it was written, and it is written with the tensors last.
    Raises `Damaged`, `ConfigError` and `OSError` like it.
    """
    outline, sizes = _read(directory, _outlined)
    _check_sizes(directory, sizes)
    return outline


def _outlined(raw: bytes) -> tuple[ManifestSummary, dict[str, int]]:
    """The outline of a manifest's text, and the sizes of its files."""
    begin = raw.find(_TENSORS)
    facts: Mapping[str, Any]
    try:
        if begin < 0:
            raise Malformed("tensors", None, "does not stand last")
        tree = parse_json(raw[:begin] + b"}")
        _check_format(tree)
        tree.only(("format", "facts", "files", "attachments"))
        (files, attachments), facts = _files(tree), tree["facts"].mapping()
        tensors = raw.count(b'":["', begin)
    except Malformed:  # not as this version writes it
        manifest = parse(raw)
        files, attachments, facts = dict(manifest.files), manifest.attachments, manifest.facts
        tensors = len(manifest.tensors)
    sizes = {**files, **{entry.file: entry.bytes for entry in attachments}}
    return ManifestSummary(facts, sum(sizes.values()), len(files), tensors), sizes


_TENSORS = b',"tensors":{'


def _check_whole(name: str, shape: tuple[int, ...], pieces: tuple[StoredPiece, ...]) -> None:
    end = 0
    for piece in pieces:
        if piece.first != end:
            raise ValueError(f"{name}: element {min(end, piece.first)} was saved by no rank, or by two")
        end += piece.elements
    if end != math.prod(shape):
        raise ValueError(f"{name}: elements from {end} on were saved by no rank")


def _tensor_tree(tensor: StoredTensor) -> list[Any]:
    pieces = [[p.file, p.begin, p.first, p.elements, p.sha256] for p in tensor.pieces]
    return [NAMES[tensor.dtype], list(tensor.shape), pieces]


def _tensor(item: Item) -> StoredTensor:
    parts = item.list()
    if len(parts) != 3:
        raise item.malformed("must be a dtype, a shape and pieces")
    shape = tuple(size.whole() for size in parts[1].list())
    pieces = tuple(_piece(each, f"{item.where}[2][{index}]") for index, each in enumerate(_plain_list(parts[2])))
    end = 0
    for piece in pieces:
        if piece.first != end:
            raise parts[2].malformed(f"element {min(end, piece.first)} is in no piece, or in two")
        end += piece.elements
    if end != math.prod(shape) or not pieces:
        raise parts[2].malformed(f"pieces hold {end} elements where the shape {list(shape)} asks for others")
    return StoredTensor(read_dtype(parts[0]), shape, pieces)


def _plain_list(item: Item) -> list[Any]:
    if not isinstance(item.value, list):
        raise item.malformed("must be a list")
    return item.value


def _piece(tree: object, where: str) -> StoredPiece:
    """Of a large run there are hundreds of thousands: what is right is read without more."""
    match tree:
        case [str(file), int(begin), int(first), int(elements), str(sha256)] if (
            type(begin) is type(first) is type(elements) is int and min(begin, first, elements) >= 0
        ):
            return StoredPiece(file, begin, first, elements, sha256)
    hint = "must be a file, its first byte, the first element, the number of elements, and a SHA-256"
    raise Malformed(where, tree, hint)


def _key_name(name: str, item: Item) -> str:
    return Item(name, item.where).file_name()


def _attachment(item: Item, files: Mapping[str, int]) -> FileEntry:
    entry = item.build(FileEntry)
    item["file"].file_name()
    item["sha256"].sha256()
    if entry.file in (*files, MANIFEST, MARKER):
        raise item["file"].malformed("is a file of tensors, or the manifest, too")
    return entry


def _check_places(item: Item, tensors: Mapping[str, StoredTensor], files: Mapping[str, int]) -> None:
    """Every piece lies in a file of the manifest, before its end, and on no byte of another."""
    places: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for name, tensor in tensors.items():
        for piece in tensor.pieces:
            end = piece.begin + piece.elements * tensor.dtype.itemsize
            if piece.file not in files:
                raise item[name].malformed(f"a piece lies in {piece.file!r}, which the manifest does not list")
            if end > files[piece.file]:
                raise item[name].malformed(f"a piece passes the end of {piece.file}: {files[piece.file]} bytes")
            places[piece.file].append((piece.begin, end, name))
    for own in places.values():
        own.sort()
        for (_, end, _), (begin, _, name) in itertools.pairwise(own):
            if begin < end:
                raise item[name].malformed("a piece lies on bytes of another tensor")
