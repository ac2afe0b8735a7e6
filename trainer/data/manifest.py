"""What a prepared directory holds: `manifest.json`, written last and read first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...comm.refusal import Problem, Refused

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Source:
    """One work of the corpus, as it was when it was read."""

    work: str
    file: str
    split: str
    """`train` or `validation`."""
    documents: int
    bytes: int
    """Size of the file."""
    sha256: str
    """Of the file."""


@dataclass(frozen=True)
class FileEntry:
    """One file of the prepared directory."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SplitEntry:
    """The tokens of one split, and the files they are in."""

    tokens: int
    """Of all documents, each with its end token."""
    documents: int
    bytes: int
    """UTF-8 bytes of the documents' text."""
    shards: tuple[FileEntry, ...]
    """In order; each but the last holds `Manifest.shard_tokens` tokens."""
    starts: FileEntry
    """int64 `.npy`: where each document starts, in tokens."""


@dataclass(frozen=True)
class Manifest:
    """Everything about a prepared directory but the tokens themselves. Holds neither times nor absolute paths."""

    format: int
    fingerprint: str
    """SHA-256 of what went in: the works and the settings. Equal fingerprints need no second preparation."""
    vocabulary: int
    dtype: str
    """Of a shard: `uint16` or `uint32`, little-endian."""
    shard_tokens: int
    sources: tuple[Source, ...]
    tokenizer: FileEntry
    train: SplitEntry
    validation: SplitEntry

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """Every file but the manifest."""
        splits = (self.train, self.validation)
        return (self.tokenizer, *(file for split in splits for file in (*split.shards, split.starts)))

    @property
    def digest(self) -> str:
        """SHA-256 of what came out: equal digests mean equal tokens in an equal order."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Little-endian on any machine."""
        return np.dtype(self.dtype).newbyteorder("<")

    def to_json(self) -> str:
        """The text of the file."""
        return json.dumps(asdict(self), indent=2) + "\n"


def fingerprint(sources: Sequence[Source], vocabulary: int, shard_tokens: int) -> str:
    """SHA-256 of what a preparation depends on."""
    facts = {
        "format": FORMAT,
        "vocabulary": vocabulary,
        "shard_tokens": shard_tokens,
        "sources": [asdict(source) for source in sources],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def token_dtype(vocabulary: int) -> str:
    """The narrowest type of a shard that can name every token."""
    return "uint16" if vocabulary <= 2**16 else "uint32"


def read_manifest(directory: Path) -> Manifest:
    """Read and check `manifest.json`. Raises `Refused` when it is missing, damaged, or of another format."""
    path = directory / MANIFEST
    if not path.is_file():
        raise Refused([Problem(str(path), None, "is missing: run `shoestring data prepare` first")])
    try:
        tree = json.loads(path.read_bytes())
        if isinstance(tree, dict) and tree.get("format") != FORMAT:
            remedy = f"this version reads format {FORMAT}; remove {directory} and prepare again"
            raise Refused([Problem(str(path), tree.get("format"), remedy)])
        manifest = _parse(tree)
    except (ValueError, KeyError, TypeError) as error:
        remedy = f"is damaged; remove {directory} and prepare again"
        raise Refused([Problem(str(path), f"{type(error).__name__}: {error}", remedy)]) from error
    return manifest


def _parse(tree: dict[str, Any]) -> Manifest:
    """Strict: a wrong key, a wrong type, or a changed fact raises `TypeError`, `KeyError` or `ValueError`."""
    parsed = dict(tree)
    parsed["sources"] = tuple(_of(Source, source) for source in tree["sources"])
    parsed["tokenizer"] = _file(tree["tokenizer"])
    for split in ("train", "validation"):
        entry = dict(tree[split])
        entry["shards"] = tuple(_file(shard) for shard in entry["shards"])
        entry["starts"] = _file(entry["starts"])
        parsed[split] = _of(SplitEntry, entry)
    manifest: Manifest = _of(Manifest, parsed)
    if manifest.fingerprint != fingerprint(manifest.sources, manifest.vocabulary, manifest.shard_tokens):
        raise ValueError("the fingerprint does not fit the sources and settings")
    if manifest.dtype != token_dtype(manifest.vocabulary):
        raise ValueError(f"{manifest.dtype} shards for {manifest.vocabulary} tokens")
    return manifest


def _file(tree: dict[str, Any]) -> FileEntry:
    entry: FileEntry = _of(FileEntry, tree)
    if Path(entry.file).name != entry.file:
        raise ValueError(f"{entry.file!r} is not the name of a file in this directory")
    return entry


def _of(cls: Any, tree: dict[str, Any]) -> Any:
    """The dataclass `cls` from its fields, whose plain types are checked by name."""
    made = cls(**tree)
    for name, annotation in cls.__annotations__.items():
        expected = {"int": int, "str": str}.get(annotation)
        if expected is not None and type(tree[name]) is not expected:
            raise TypeError(f"{name} is {tree[name]!r}, not {annotation}")
    return made
