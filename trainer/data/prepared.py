"""A prepared directory, opened: what training, evaluation and inspection read.

Before a run it is found out, at a bounded price, whether its bytes are those that were written:

* Up to 256 MiB every byte is read before every launch.
* A larger file is read once, and again when its size or its time of change is another. A stamp beside the data says
  which files were found whole; it holds their digests, so it is worth nothing to other data. Machines that share the
  directory leave this to the first one. A disk that changes a byte without touching the time of change is not caught.
* While a run goes on, each process looks at a shard again when it reads it first and after any change of its marks
  (see `shard_files.py`).
* `shoestring data inspect` always reads everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...comm.errors import ConfigError, Problem, raise_if_any
from .config import DataConfig
from .manifest import DataManifest, read_manifest
from .shards import TokenSplit, open_split, verify_file_hashes
from .tokenizer import Tokenizer, load_tokenizer
from .verified_files import read_file_signature, read_verified_files, write_verified_files


@dataclass(frozen=True)
class PreparedData:
    """Tokenizer and splits, which belong together."""

    manifest: DataManifest
    tokenizer: Tokenizer
    train: TokenSplit
    validation: TokenSplit


def open_prepared_directory(directory: Path) -> PreparedData:
    """Open what is there, and check what is cheap to check: format, sizes, tokenizer.

    Raises `ConfigError` with all problems of the files; `verify_prepared_data` reads every byte.
    """
    manifest = read_manifest(directory)
    problems: list[Problem] = []
    splits = {}
    for name in ("train", "validation"):
        try:
            splits[name] = open_split(directory, manifest, name)
        except ConfigError as refusal:
            problems.extend(refusal.problems)
    entry = manifest.tokenizer
    try:
        tokenizer = load_tokenizer(directory / entry.file, manifest.vocabulary, entry.sha256)
    except ConfigError as refusal:
        raise ConfigError([*problems, *refusal.problems]) from refusal
    raise_if_any(problems)
    return PreparedData(manifest, tokenizer, splits["train"], splits["validation"])


def open_prepared_data(config: DataConfig) -> PreparedData:
    """Open `config.prepared` for a run. The corpus itself need not be there.

    Raises `ConfigError` when the directory is damaged, or was prepared with another vocabulary or other works held out.
    """
    directory = Path(config.prepared)
    manifest = read_manifest(directory)
    problems = []
    if config.vocab_size != manifest.vocabulary:
        hint = f"{config.prepared} was prepared with {manifest.vocabulary}; use that, or another data.prepared"
        problems.append(Problem("data.vocab_size", config.vocab_size, hint))
    held_out = tuple(source.work for source in manifest.sources if source.split == "validation")
    if set(config.validation) != set(held_out):
        hint = f"{config.prepared} was prepared with {', '.join(held_out)} held out; use that, or another data.prepared"
        problems.append(Problem("data.validation", config.validation, hint))
    try:
        prepared = open_prepared_directory(directory)
    except ConfigError as refusal:
        raise ConfigError([*problems, *refusal.problems]) from refusal
    raise_if_any(problems)
    return prepared


def verify_prepared_data(directory: Path) -> PreparedData:
    """Open a prepared directory and check its every byte. Raises `ConfigError` with each damaged file."""
    verify_file_hashes(directory, read_manifest(directory).files)
    return open_prepared_directory(directory)


ALWAYS_VERIFY_BYTES = 2**28


def verify_before_run(directory: Path, manifest: DataManifest, *, first_machine: bool) -> None:
    """Raise `ConfigError` with each file of `directory` that is found to be other than what was written."""
    if sum(entry.bytes for entry in manifest.files) <= ALWAYS_VERIFY_BYTES:
        verify_file_hashes(directory, manifest.files)
    elif first_machine:
        stamped = read_verified_files(directory)
        marks = {
            entry.file: read_file_signature(directory, entry) for entry in manifest.files
        }  # before the files are read
        unknown = [entry for entry in manifest.files if stamped.get(entry.file) != marks[entry.file]]
        verify_file_hashes(directory, unknown)
        if unknown:
            write_verified_files(directory, marks)
