"""`manifest.json` of a prepared directory: its files, sizes and hashes. Written last, read first."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...comm.errors import ConfigError, Problem
from ...comm.files.file_io import os_error_to_problem, read_json
from ...comm.files.ranges import FILE_NAME, SHA256, at_least, between, one_of
from ...comm.files.strict_json import JsonValue, MalformedFileError

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class CorpusFile:
    """One file of the corpus as it was read."""

    work: str
    file: str
    split: str = one_of(("train", "validation"))
    """`train` or `validation`."""
    documents: int
    bytes: int
    """File size."""
    sha256: str
    """SHA-256 of the file, hexadecimal."""


@dataclass(frozen=True)
class FileEntry:
    """One file of the prepared directory."""

    file: str = field(metadata=FILE_NAME.metadata)
    bytes: int
    sha256: str = field(metadata=SHA256.metadata)


@dataclass(frozen=True)
class SplitEntry:
    """Token count and files of one split."""

    tokens: int
    """Tokens of all documents, including an end token for each."""
    documents: int
    bytes: int
    """UTF-8 bytes of the documents' text."""
    shards: tuple[FileEntry, ...]
    """Shards in order; each but the last holds `DataManifest.shard_tokens` tokens."""
    starts: FileEntry
    """File of document starts in tokens: int64 [M], `.npy`."""


@dataclass(frozen=True, kw_only=True)
class DataManifest:
    """Everything about a prepared directory except the tokens; no times and no absolute paths."""

    format: int
    fingerprint: str
    """SHA-256 of the inputs: corpus files and settings. Equal fingerprints need no second preparation."""
    vocabulary: int = between(1, 2**32)
    dtype: str
    """Dtype of the shards: `uint16` or `uint32`, little-endian."""
    shard_tokens: int = at_least(1)
    sources: tuple[CorpusFile, ...]
    tokenizer: FileEntry
    train: SplitEntry
    validation: SplitEntry

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """All files except the manifest."""
        splits = (self.train, self.validation)
        return (self.tokenizer, *(file for split in splits for file in (*split.shards, split.starts)))

    @property
    def content_hash(self) -> str:
        """SHA-256 of the result: equal hashes mean equal tokens in equal order."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """NumPy dtype of the shards, little-endian on every machine."""
        return np.dtype(self.dtype).newbyteorder("<")

    def to_json(self) -> str:
        """Return the text of the file."""
        return json.dumps(asdict(self), indent=2) + "\n"


def source_fingerprint(sources: Sequence[CorpusFile], vocabulary: int, shard_tokens: int) -> str:
    """Return the SHA-256 of everything that a preparation depends on."""
    inputs = {
        "format": FORMAT_VERSION,
        "vocabulary": vocabulary,
        "shard_tokens": shard_tokens,
        "sources": [asdict(source) for source in sources],
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def token_dtype(vocabulary: int) -> str:
    """Return the narrowest shard dtype that can hold every token."""
    return "uint16" if vocabulary <= 2**16 else "uint32"


def read_manifest(directory: Path) -> DataManifest:
    """Read and check `manifest.json`. Raises `ConfigError` when it is missing, damaged, or of another format."""
    path = directory / MANIFEST_FILE
    if not path.exists():
        hint = (
            f"no prepared data in {directory}. Run: shoestring data prepare experiment=quickstart (or your experiment)"
        )
        raise ConfigError([Problem("data.prepared", str(directory), hint)])
    try:
        tree = read_json(path)
        found = tree["format"].value
        if found != FORMAT_VERSION or type(found) is not int:
            hint = f"this version reads format {FORMAT_VERSION}; remove {directory} and prepare again"
            raise ConfigError([Problem(str(path), found, hint)])
        return _parse(tree)
    except MalformedFileError as error:
        hint = f"is damaged; remove {directory} and prepare again"
        raise ConfigError([Problem(str(path), str(error), hint)]) from error
    except OSError as error:
        raise ConfigError([os_error_to_problem(error, path, "make it readable")]) from error


def _parse(tree: JsonValue) -> DataManifest:
    """Parse the manifest. Raises `MalformedFileError` for a wrong key, type or range, and for inconsistent values."""
    manifest = tree.as_dataclass(DataManifest)
    for name, split in (("train", manifest.train), ("validation", manifest.validation)):
        if not 1 <= split.documents <= split.tokens:  # each document has an end token
            raise tree[name]["documents"].malformed_error(f"must be from 1 to the number of tokens, {split.tokens}")
    names = [entry.file for entry in manifest.files]
    if len(set(names)) < len(names) or MANIFEST_FILE in names:
        raise MalformedFileError("files", sorted(names), "must have different names")
    if manifest.fingerprint != source_fingerprint(manifest.sources, manifest.vocabulary, manifest.shard_tokens):
        raise tree["fingerprint"].malformed_error("does not fit the sources and settings")
    if manifest.dtype != token_dtype(manifest.vocabulary):
        hint = f"must be {token_dtype(manifest.vocabulary)} for {manifest.vocabulary} tokens"
        raise tree["dtype"].malformed_error(hint)
    return manifest
