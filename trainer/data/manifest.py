"""What a prepared directory holds: `manifest.json`, written last and read first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...comm.errors import ConfigError, Problem
from ...comm.files.access import os_problem, read_json
from ...comm.files.strict_json import Item, Malformed

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
    """In order; each but the last holds `DataManifest.shard_tokens` tokens."""
    starts: FileEntry
    """int64 `.npy`: where each document starts, in tokens."""


@dataclass(frozen=True)
class DataManifest:
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


def read_manifest(directory: Path) -> DataManifest:
    """Read and check `manifest.json`. Raises `ConfigError` when it is missing, damaged, or of another format."""
    path = directory / MANIFEST
    if not path.exists():
        raise ConfigError([Problem(str(path), None, "is missing: run `shoestring data prepare` first")])
    try:
        tree = read_json(path)
        found = tree["format"].value
        if found != FORMAT or type(found) is not int:
            hint = f"this version reads format {FORMAT}; remove {directory} and prepare again"
            raise ConfigError([Problem(str(path), found, hint)])
        return _parse(tree)
    except Malformed as error:
        hint = f"is damaged; remove {directory} and prepare again"
        raise ConfigError([Problem(str(path), str(error), hint)]) from error
    except OSError as error:
        raise ConfigError([os_problem(error, path, "let it be read")]) from error


def _parse(tree: Item) -> DataManifest:
    """Raises `Malformed` for a wrong key, type or range, and where two facts do not fit each other."""
    manifest = tree.build(DataManifest)
    files = [tree["tokenizer"]]
    for name, split in (("train", manifest.train), ("validation", manifest.validation)):
        files += [*tree[name]["shards"].list(), tree[name]["starts"]]
        if not 1 <= split.documents <= split.tokens:  # each document has an end token
            raise tree[name]["documents"].malformed(f"must be from 1 to the number of tokens, {split.tokens}")
    for file in files:
        file["file"].file_name()
        file["sha256"].sha256()
    for source in tree["sources"].list():
        if source["split"].text() not in ("train", "validation"):
            raise source["split"].malformed("must be train or validation")
    names = [entry.file for entry in manifest.files]
    if len(set(names)) < len(names) or MANIFEST in names:
        raise Malformed("files", sorted(names), "must have a name each")
    tree["vocabulary"].whole(1, 2**32)
    tree["shard_tokens"].whole(1)
    if manifest.fingerprint != fingerprint(manifest.sources, manifest.vocabulary, manifest.shard_tokens):
        raise tree["fingerprint"].malformed("does not fit the sources and settings")
    if manifest.dtype != token_dtype(manifest.vocabulary):
        raise tree["dtype"].malformed(f"must be {token_dtype(manifest.vocabulary)} for {manifest.vocabulary} tokens")
    return manifest
