"""`manifest.json`: what a checkpoint holds, where, and the SHA-256 of every piece. JSON: reading it runs no code."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...comm.refusal import Problem, Refused
from ..data.manifest import FileEntry
from .tensor_file import DTYPES, NAMES, Declared

FORMAT = 2
"""1 was torch DCP's, whose metadata is a pickle."""
MANIFEST = "manifest.json"
MARKER = "complete"
"""Holds the SHA-256 of the manifest, and is written last."""


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
class Manifest:
    """Everything about a checkpoint but the tensors' bytes."""

    facts: Mapping[str, Any]
    """Step, configuration, data position, totals of the ledger: see `trainer/checkpointing.py`."""
    tensors: Mapping[str, StoredTensor]
    files: Mapping[str, int]
    """Files of tensors, and their sizes in bytes."""
    attachments: tuple[FileEntry, ...]
    """Other files, such as `tokenizer.json`."""

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(self.files.values()) + sum(entry.bytes for entry in self.attachments)

    def to_json(self) -> str:
        """The text of the file."""
        tree = {
            "format": FORMAT,
            "facts": self.facts,
            "files": self.files,
            "attachments": [asdict(entry) for entry in self.attachments],
            "tensors": {name: _tensor_tree(tensor) for name, tensor in sorted(self.tensors.items())},
        }
        return json.dumps(tree, separators=(",", ":"))


def parse(text: str) -> Manifest:
    """The inverse of `Manifest.to_json`. Raises `ValueError`, `KeyError` or `TypeError` for anything else."""
    tree = json.loads(text)
    return Manifest(
        facts=tree["facts"],
        tensors={name: _tensor(each) for name, each in tree["tensors"].items()},
        files=tree["files"],
        attachments=tuple(FileEntry(**entry) for entry in tree["attachments"]),
    )


def merge(
    records: Iterable[Mapping[str, Any]],
    facts: Mapping[str, Any],
    attachments: Iterable[FileEntry],
) -> Manifest:
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
    return Manifest(facts, tensors, files, tuple(attachments))


def record(file: str, size: int, pieces: Iterable[tuple[Declared, StoredPiece]]) -> dict[str, Any]:
    """What one rank says of its file, as plain values for `merge`."""
    described = [
        (whole.name, (NAMES[whole.dtype], whole.shape, piece.begin, piece.first, piece.elements, piece.sha256))
        for whole, piece in pieces
    ]
    return {"file": file, "bytes": size, "pieces": described}


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a complete checkpoint, and that its files have their sizes.

    Raises `Damaged`, `Refused` for another format, and `OSError` where files are there and cannot be read.
    """
    raw = _hashed(directory)
    try:
        _check_format(directory, json.loads(raw)["format"])
        manifest = parse(raw.decode())
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{directory / MANIFEST}: {type(error).__name__}: {error}") from error
    _check_sizes(directory, {**manifest.files, **{entry.file: entry.bytes for entry in manifest.attachments}})
    return manifest


def _hashed(directory: Path) -> bytes:
    """The text of the manifest, which has the hash that is in the marker."""
    try:
        marker = (directory / MARKER).read_text().strip()
        raw = (directory / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Damaged(f"{error.filename}: is missing") from error
    if hashlib.sha256(raw).hexdigest() != marker:
        raise Damaged(f"{directory / MANIFEST}: its SHA-256 is not that in {MARKER}")
    return raw


def _check_format(directory: Path, found: Any) -> None:
    if found != FORMAT:
        remedy = f"this version reads format {FORMAT}; go on with the version that wrote it, or start over"
        raise Refused([Problem(str(directory / MANIFEST), found, remedy)])


def _check_sizes(directory: Path, sizes: Mapping[str, int]) -> None:
    for file, size in sizes.items():
        path = directory / file
        if not path.is_file():
            raise Damaged(f"{path}: is missing")
        if path.stat().st_size != size:
            raise Damaged(f"{path}: has {path.stat().st_size} bytes instead of {size}")


@dataclass(frozen=True)
class Outline:
    """What a list of checkpoints says of one: its manifest, without its tensors."""

    facts: Mapping[str, Any]
    bytes: int
    """Of all files."""
    files: int
    """Of tensors."""
    tensors: int


def read_outline(directory: Path) -> Outline:
    """The outline of a complete checkpoint; the same checks as `read_manifest` makes, without parsing the tensors.

    The hash in the marker says that the manifest is as it was written, and it is written with the tensors last.
    Raises `Damaged`, `Refused` and `OSError` like it.
    """
    raw = _hashed(directory)
    begin = raw.find(_TENSORS)
    try:
        if begin < 0:
            raise ValueError("is not as this version writes it")
        tree = json.loads(raw[:begin] + b"}")
        _check_format(directory, tree["format"])
        sizes = {**tree["files"], **{entry["file"]: entry["bytes"] for entry in tree["attachments"]}}
        facts, files = tree["facts"], len(tree["files"])
    except (ValueError, KeyError, TypeError):
        manifest = read_manifest(directory)
        return Outline(manifest.facts, manifest.bytes, len(manifest.files), len(manifest.tensors))
    _check_sizes(directory, sizes)
    return Outline(facts, sum(sizes.values()), files, raw.count(b'":["', begin))


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


def _tensor(tree: list[Any]) -> StoredTensor:
    dtype, shape, pieces = tree
    return StoredTensor(DTYPES[dtype], tuple(shape), tuple(StoredPiece(*piece) for piece in pieces))
