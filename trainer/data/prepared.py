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

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...comm.errors import ConfigError, Problem, collect_problems, raise_if_any
from .config import DataConfig
from .manifest import SPLITS, DataManifest, DataPart, FileEntry, read_manifest, read_parts
from .shards import TokenSplit, open_split, verify_file_hashes
from .tokenizer import Tokenizer, load_prepared_tokenizer, read_tokenizer_json
from .verified_files import read_file_signature, read_verified_files, write_verified_files


@dataclass(frozen=True)
class PreparedData:
    """Manifest, tokenizer and splits of one prepared directory."""

    manifest: DataManifest
    parts: tuple[DataPart, ...]
    tokenizer: Tokenizer
    train: TokenSplit
    validation: TokenSplit


def open_prepared_directory(directory: Path) -> PreparedData:
    """Open a prepared directory after checking format version, file sizes and tokenizer.

    Raises `ConfigError` with all problems of the files; `verify_prepared_data` reads every byte.
    """
    manifest = read_manifest(directory)
    parts = read_parts(directory, manifest)
    problems: list[Problem] = []
    splits = {}
    for name in SPLITS:
        with collect_problems(problems):
            splits[name] = open_split(directory, manifest, parts, name)
    with collect_problems(problems):
        tokenizer = load_prepared_tokenizer(directory, manifest)
    raise_if_any(problems)
    return PreparedData(manifest, parts, tokenizer, splits["train"], splits["validation"])


def open_prepared_data(config: DataConfig) -> PreparedData:
    """Open `config.prepared` for a run; the corpus need not exist.

    Raises `ConfigError` if the directory is damaged, or was prepared with other settings.
    """
    directory = Path(config.prepared)
    manifest = read_manifest(directory)
    problems = list(_setting_problems(config, manifest))
    with collect_problems(problems):
        prepared = open_prepared_directory(directory)
    raise_if_any(problems)
    return prepared


def _setting_problems(config: DataConfig, manifest: DataManifest) -> Iterator[Problem]:
    """Yield a problem for each setting of the configuration that the data was not prepared with."""
    settings = manifest.settings
    wanted: dict[str, object] = {
        "text_key": config.text_key,
        "validation": tuple(sorted(config.validation)),
        "validation_fraction": config.validation_fraction,
        "seed": config.seed,
        "shuffle": config.shuffle,
        "fim_rate": config.fim_rate,
        "token_split_rate": config.token_split_rate,
    }
    found = {key: getattr(settings, key) for key in wanted} | {"validation": tuple(sorted(settings.validation))}
    if config.vocab_size is not None:
        wanted["vocab_size"], found["vocab_size"] = config.vocab_size, settings.vocab_size
    for key, value in wanted.items():
        if found[key] != value:
            shown = ", ".join(settings.validation) or "none" if key == "validation" else found[key]
            hint = f"{config.prepared} was prepared with {shown}; use that, or another data.prepared"
            yield Problem(f"data.{key}", getattr(config, key), hint)


def tokenizer_problems(config: DataConfig, prepared: PreparedData) -> Iterator[Problem]:
    """Yield a problem for each token setting that the data was not prepared with. Reads `data.tokenizer`."""
    settings, tokenizer = prepared.manifest.settings, prepared.tokenizer
    use = f"or another data.prepared than {config.prepared}"
    if config.tokenizer is not None:
        try:
            raw = read_tokenizer_json(Path(config.tokenizer))
        except ConfigError as error:
            yield from error.problems
            return
        if hashlib.sha256(raw).hexdigest() != settings.tokenizer_sha256:
            hint = f"is not the tokenizer that the data was prepared with; use that, {use}"
            yield Problem("data.tokenizer", config.tokenizer, hint)
            return
    end = tokenizer.token_id(config.eos_token) if isinstance(config.eos_token, str) else config.eos_token
    if config.eos_token is not None and end != settings.eos_token_id:
        hint = f"the documents of the data end with {tokenizer.decode([settings.eos_token_id])!r}; use that, {use}"
        yield Problem("data.eos_token", config.eos_token, hint)
    fim_token_ids = tuple(map(tokenizer.token_id, config.fim_tokens or ()))
    if fim_token_ids and settings.fim_token_ids and fim_token_ids != settings.fim_token_ids:
        names = [tokenizer.decode([number]) for number in settings.fim_token_ids]
        yield Problem("data.fim_tokens", config.fim_tokens, f"the data has {names}; use these, {use}")


def all_files(manifest: DataManifest, parts: Sequence[DataPart]) -> tuple[FileEntry, ...]:
    """Return all files of a prepared directory except the manifest."""
    return (*manifest.head_files, *(entry for part in parts for entry in part.files))


def verify_prepared_data(directory: Path) -> PreparedData:
    """Open a prepared directory after reading every byte. Raises `ConfigError` with each damaged file."""
    manifest = read_manifest(directory)
    verify_file_hashes(directory, all_files(manifest, read_parts(directory, manifest)))
    return open_prepared_directory(directory)


ALWAYS_VERIFY_BYTES = 2**28


def verify_before_run(directory: Path, prepared: PreparedData, *, first_machine: bool) -> None:
    """Raise `ConfigError` with each file of `directory` that differs from the manifest."""
    files = all_files(prepared.manifest, prepared.parts)
    if sum(entry.bytes for entry in files) <= ALWAYS_VERIFY_BYTES:
        verify_file_hashes(directory, files)
    elif first_machine:
        verified = read_verified_files(directory)
        # Taken before the files are read: a change during the read then shows at the next launch.
        signatures = {entry.file: read_file_signature(directory, entry) for entry in files}
        unknown = [entry for entry in files if verified.get(entry.file) != signatures[entry.file]]
        verify_file_hashes(directory, unknown)
        if unknown:
            write_verified_files(directory, signatures)
