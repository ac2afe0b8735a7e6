"""A prepared directory, opened for training, evaluation and inspection.

Its files are checked against their hashes at a bounded cost:

* Up to 256 MiB in total, every byte is read before every launch.
* Larger data is read once, and a file again when its size or modification time has changed. `.verified.json` in the
  directory lists the verified files with their hashes. Machines that share the directory leave this to the first one.
  A disk that changes a byte without touching the modification time is not caught.
* During a run each process checks a shard when it first reads it and after any change of its size or times (see
  `shard_files.py`).
* `shoestring data inspect` always reads everything.
"""

from dataclasses import dataclass
from pathlib import Path

from ...comm.errors import Problem, collect_problems, raise_if_any
from .config import DataConfig
from .manifest import DataManifest, read_manifest
from .shards import TokenSplit, open_split, verify_file_hashes
from .tokenizer import Tokenizer, load_tokenizer
from .verified_files import read_file_signature, read_verified_files, write_verified_files


@dataclass(frozen=True)
class PreparedData:
    """Manifest, tokenizer and splits of one prepared directory."""

    manifest: DataManifest
    tokenizer: Tokenizer
    train: TokenSplit
    validation: TokenSplit


def open_prepared_directory(directory: Path) -> PreparedData:
    """Open a prepared directory after checking format version, file sizes and tokenizer.

    Raises `ConfigError` with all problems of the files; `verify_prepared_data` reads every byte.
    """
    manifest = read_manifest(directory)
    problems: list[Problem] = []
    splits = {}
    for name in ("train", "validation"):
        with collect_problems(problems):
            splits[name] = open_split(directory, manifest, name)
    entry = manifest.tokenizer
    with collect_problems(problems):
        tokenizer = load_tokenizer(directory / entry.file, manifest.vocabulary, entry.sha256)
    raise_if_any(problems)
    return PreparedData(manifest, tokenizer, splits["train"], splits["validation"])


def open_prepared_data(config: DataConfig) -> PreparedData:
    """Open `config.prepared` for a run; the corpus need not exist.

    Raises `ConfigError` if the directory is damaged, or was prepared with another vocabulary or other validation files.
    """
    directory = Path(config.prepared)
    manifest = read_manifest(directory)
    problems: list[Problem] = []
    if config.vocab_size != manifest.vocabulary:
        hint = f"{config.prepared} was prepared with {manifest.vocabulary}; use that, or another data.prepared"
        problems.append(Problem("data.vocab_size", config.vocab_size, hint))
    held_out = tuple(source.work for source in manifest.sources if source.split == "validation")
    if set(config.validation) != set(held_out):
        hint = f"{config.prepared} was prepared with {', '.join(held_out)} held out; use that, or another data.prepared"
        problems.append(Problem("data.validation", config.validation, hint))
    with collect_problems(problems):
        prepared = open_prepared_directory(directory)
    raise_if_any(problems)
    return prepared


def verify_prepared_data(directory: Path) -> PreparedData:
    """Open a prepared directory after reading every byte. Raises `ConfigError` with each damaged file."""
    verify_file_hashes(directory, read_manifest(directory).files)
    return open_prepared_directory(directory)


ALWAYS_VERIFY_BYTES = 2**28


def verify_before_run(directory: Path, manifest: DataManifest, *, first_machine: bool) -> None:
    """Raise `ConfigError` with each file of `directory` that differs from the manifest."""
    if sum(entry.bytes for entry in manifest.files) <= ALWAYS_VERIFY_BYTES:
        verify_file_hashes(directory, manifest.files)
    elif first_machine:
        verified = read_verified_files(directory)
        # Taken before the files are read: a change during the read then shows at the next launch.
        signatures = {entry.file: read_file_signature(directory, entry) for entry in manifest.files}
        unknown = [entry for entry in manifest.files if verified.get(entry.file) != signatures[entry.file]]
        verify_file_hashes(directory, unknown)
        if unknown:
            write_verified_files(directory, signatures)
