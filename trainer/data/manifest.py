"""`manifest.json` of a prepared directory, and the list of its token files. Written last, read first.

Letters: M documents.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...comm.errors import ConfigError, Problem, UnsupportedFormatConfigError
from ...comm.files.file_io import config_error_context, os_error_to_problem, read_json, read_regular_file
from ...comm.files.ranges import FILE_NAME, SHA256, at_least, between
from ...comm.files.strict_json import JsonValue, MalformedFileError, UnsupportedFormatError, parse_json

FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
SETTINGS_FILE = "settings.json"
"""Settings of a directory whose preparation has begun."""
SPLITS = ("train", "validation")
TOKEN_DTYPES = ("<u2", "<u4", "<i4", "<i8")
"""Dtypes of shards, as NumPy writes them."""


@dataclass(frozen=True)
class FileEntry:
    """One file of the prepared directory."""

    file: str = field(metadata=FILE_NAME.metadata)
    bytes: int
    sha256: str = field(metadata=SHA256.metadata)


@dataclass(frozen=True, kw_only=True)
class PreparationSettings:
    """Settings that decide the tokens of a document, and the order of documents."""

    tokenizer_sha256: str = field(metadata=SHA256.metadata)
    eos_token_id: int
    """Token after each document."""
    vocab_size: int = between(1, 2**32)
    """One more than the tokenizer's largest token id."""
    text_key: str
    validation: tuple[str, ...]
    validation_fraction: float
    seed: int
    shuffle: bool
    fim_rate: float
    fim_token_ids: tuple[int, ...]
    """Tokens before prefix, suffix and middle of a document; empty without fill-in-the-middle."""
    token_split_rate: float
    shard_tokens: int = at_least(1)

    @property
    def digest(self) -> str:
        """SHA-256 of the settings."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def dtype(self) -> str:
        """Narrowest dtype of a shard that can hold every token: `uint16` or `uint32`."""
        return "uint16" if self.vocab_size <= 2**16 else "uint32"

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """NumPy dtype of the shards, little-endian on every machine."""
        return np.dtype(self.dtype).newbyteorder("<")


@dataclass(frozen=True, kw_only=True)
class CorpusPiece:
    """Bytes of one corpus file that a part was made from."""

    file: str
    """Name relative to the corpus."""
    start: int
    bytes: int
    sha256: str = field(metadata=SHA256.metadata)


@dataclass(frozen=True, kw_only=True)
class SplitPart:
    """Tokens of one part that belong to one split."""

    tokens: int
    """Tokens of all documents, including an end token for each."""
    documents: int
    bytes: int
    """UTF-8 bytes of the documents' text."""
    shards: tuple[FileEntry, ...]
    """Shards in order; each but the last holds `shard_tokens` tokens."""
    starts: FileEntry
    """File of document starts in tokens from the part's first: int64 [M], little-endian."""


@dataclass(frozen=True, kw_only=True)
class DataPart:
    """Result of one preparation task: the tokens of some files, or of a piece of one file."""

    task: str
    pieces: tuple[CorpusPiece, ...]
    folder: str | None = None
    """Folder of shards that another program wrote and that are read in place; null: the prepared directory."""
    dtype: str | None = None
    """Dtype of these shards, as NumPy writes it; null: that of the settings."""
    empty_records: int
    bad_records: int
    train: SplitPart | None
    validation: SplitPart | None

    def split(self, name: str) -> SplitPart | None:
        """Return the part of split `name`; None if no document of this part belongs to it."""
        return {"train": self.train, "validation": self.validation}[name]

    def shards(self, name: str) -> tuple[FileEntry, ...]:
        """Return the shards of split `name`, those that are read in place by their path."""
        found = self.split(name)
        shards = () if found is None else found.shards
        return shards if self.folder is None else tuple(replace(e, file=f"{self.folder}/{e.file}") for e in shards)

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """Files of the part."""
        starts = (part.starts for part in (self.train, self.validation) if part is not None)
        return (*self.shards("train"), *self.shards("validation"), *starts)

    def to_json(self) -> str:
        """Return the part's line in the file of parts."""
        return json.dumps(asdict(self))


@dataclass(frozen=True, kw_only=True)
class SplitTotals:
    """Sizes of one split over all parts."""

    tokens: int
    documents: int
    bytes: int

    @staticmethod
    def of_parts(parts: Sequence[DataPart], name: str) -> "SplitTotals":
        """Add up split `name` of `parts`."""
        found = [part for each in parts if (part := each.split(name)) is not None]
        return SplitTotals(
            tokens=sum(part.tokens for part in found),
            documents=sum(part.documents for part in found),
            bytes=sum(part.bytes for part in found),
        )


@dataclass(frozen=True, kw_only=True)
class DataManifest:
    """Everything about a prepared directory except the tokens; no times and no absolute paths."""

    format: int
    settings: PreparationSettings
    source: str | None
    """Place of the text, as the configuration names it."""
    license: str | None
    tokenizer: FileEntry
    tokenizer_config: FileEntry | None
    parts: FileEntry
    train: SplitTotals
    validation: SplitTotals

    def split(self, name: str) -> SplitTotals:
        """Return the sizes of split `name`."""
        return {"train": self.train, "validation": self.validation}[name]

    @property
    def head_files(self) -> tuple[FileEntry, ...]:
        """All files except the manifest and those of the parts."""
        config = () if self.tokenizer_config is None else (self.tokenizer_config,)
        return (self.tokenizer, *config, self.parts)

    @property
    def content_hash(self) -> str:
        """SHA-256 of the result: equal hashes mean equal tokens in equal order."""
        content = [self.format, asdict(self.settings), self.parts.sha256]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """Return the text of the file."""
        return json.dumps(asdict(self), indent=2) + "\n"


def read_manifest(directory: Path) -> DataManifest:
    """Read and check `manifest.json`. Raises `ConfigError` when it is missing, damaged, or of another format."""
    path = directory / MANIFEST_FILE
    if not path.exists():
        found = "preparation is not finished" if (directory / SETTINGS_FILE).exists() else "no prepared data"
        hint = f"{found} in {directory}. Run: shoestring data prepare experiment=quickstart (or your experiment)"
        raise ConfigError([Problem("data.prepared", str(directory), hint)])
    try:
        tree = read_json(path)
        tree.require_format("data manifest", FORMAT_VERSION)
        return _parse(tree)
    except UnsupportedFormatError as error:
        hint = f"this version reads format {FORMAT_VERSION}; remove {directory} and prepare again"
        raise UnsupportedFormatConfigError([Problem(str(path), error.value, hint)]) from error
    except MalformedFileError as error:
        hint = f"is damaged; remove {directory} and prepare again"
        raise ConfigError([Problem(str(path), str(error), hint)]) from error
    except OSError as error:
        raise ConfigError([os_error_to_problem(error, path, "make it readable")]) from error


def _parse(tree: JsonValue) -> DataManifest:
    """Parse the manifest. Raises `MalformedFileError` for a wrong key, type or range, and for inconsistent values."""
    manifest = tree.as_dataclass(DataManifest)
    for name in SPLITS:
        totals = manifest.split(name)
        if not 1 <= totals.documents <= totals.tokens:  # each document has an end token
            raise tree[name]["documents"].malformed_error(f"must be from 1 to the number of tokens, {totals.tokens}")
    _refuse_equal_names(manifest.head_files)
    return manifest


def read_parts(directory: Path, manifest: DataManifest) -> tuple[DataPart, ...]:
    """Read and check the list of parts. Raises `ConfigError` unless it is what the manifest names."""
    path, entry = directory / manifest.parts.file, manifest.parts
    with config_error_context(path, "remove the directory and prepare again", unreadable_fix="make it readable"):
        raw = read_regular_file(path, max(entry.bytes, 1))
        if hashlib.sha256(raw).hexdigest() != entry.sha256:
            raise MalformedFileError("", len(raw), f"must have SHA-256 {entry.sha256}")
        parts = tuple(_parse_parts(raw, manifest.settings))
        for name in SPLITS:
            if SplitTotals.of_parts(parts, name) != manifest.split(name):
                raise MalformedFileError(name, None, f"the parts do not add up to the {MANIFEST_FILE}'s numbers")
        _refuse_equal_names([*manifest.head_files, *(entry for part in parts for entry in part.files)])
    return parts


def _parse_parts(raw: bytes, settings: PreparationSettings) -> Iterator[DataPart]:
    for line in raw.splitlines():
        part = parse_json(line).as_dataclass(DataPart)
        for name in SPLITS:
            if (found := part.split(name)) is not None:
                _check_sizes(found, part, settings, f"{part.task}.{name}")
        yield part


def _check_sizes(part: SplitPart, whole: DataPart, settings: PreparationSettings, location: str) -> None:
    """Raise `MalformedFileError` unless the sizes of shards and starts fit the numbers of tokens and documents."""
    if whole.dtype not in (None, *TOKEN_DTYPES) or (whole.folder is None) != (whole.dtype is None):
        raise MalformedFileError(location, whole.dtype, f"must be one of {', '.join(TOKEN_DTYPES)}, with a folder")
    if whole.folder is not None and not Path(whole.folder).is_absolute():
        raise MalformedFileError(location, whole.folder, "must be an absolute path")
    limit = settings.shard_tokens if whole.folder is None else part.tokens
    item = (settings.numpy_dtype if whole.dtype is None else np.dtype(whole.dtype)).itemsize
    count = -(-part.tokens // limit)  # counted before a list is made: a damaged file may ask for any number
    last = part.tokens - (count - 1) * limit
    expected = [limit * item] * (min(count, len(part.shards) + 1) - 1) + [last * item]
    if count != len(part.shards) or [shard.bytes for shard in part.shards] != expected:
        found = [shard.bytes for shard in part.shards][:8]
        hint = f"{part.tokens} tokens of {item} bytes need {count} shards, the last of {last * item} bytes"
        raise MalformedFileError(location, found, hint)
    if not 1 <= part.documents <= part.tokens or part.starts.bytes != 8 * part.documents:
        raise MalformedFileError(location, part.documents, f"must be from 1 to {part.tokens}, with 8 bytes each")


def _refuse_equal_names(entries: Sequence[FileEntry]) -> None:
    counts = Counter([MANIFEST_FILE, *(entry.file for entry in entries)])
    if counts.most_common(1)[0][1] > 1:
        twice = sorted(name for name, count in counts.items() if count > 1)[:8]
        raise MalformedFileError("files", twice, "must have different names")
