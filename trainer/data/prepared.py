"""A prepared directory, opened: what training, evaluation and inspection read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...comm.errors import Problem, Refused, refuse_if_any
from .config import DataConfig
from .manifest import Manifest, read_manifest
from .shards import Split, open_split, verify_files
from .tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Prepared:
    """Tokenizer and splits, which belong together."""

    manifest: Manifest
    tokenizer: Tokenizer
    train: Split
    validation: Split


def open_directory(directory: Path) -> Prepared:
    """Open what is there, and check what is cheap to check: format, sizes, tokenizer.

    Raises `Refused` with all problems of the files; `verify` reads every byte.
    """
    manifest = read_manifest(directory)
    problems: list[Problem] = []
    splits = {}
    for name in ("train", "validation"):
        try:
            splits[name] = open_split(directory, manifest, name)
        except Refused as refusal:
            problems.extend(refusal.problems)
    entry = manifest.tokenizer
    try:
        tokenizer = load_tokenizer(directory / entry.file, manifest.vocabulary, entry.sha256)
    except Refused as refusal:
        raise Refused([*problems, *refusal.problems]) from refusal
    refuse_if_any(problems)
    return Prepared(manifest, tokenizer, splits["train"], splits["validation"])


def open_prepared(config: DataConfig) -> Prepared:
    """Open `config.prepared` for a run. The corpus itself need not be there.

    Raises `Refused` when the directory is damaged, or was prepared with another vocabulary or other works held out.
    """
    directory = Path(config.prepared)
    manifest = read_manifest(directory)
    problems = []
    if config.vocabulary != manifest.vocabulary:
        remedy = f"{config.prepared} was prepared with {manifest.vocabulary}; use that, or another data.prepared"
        problems.append(Problem("data.vocabulary", config.vocabulary, remedy))
    held_out = tuple(source.work for source in manifest.sources if source.split == "validation")
    if set(config.validation) != set(held_out):
        remedy = (
            f"{config.prepared} was prepared with {', '.join(held_out)} held out; use that, or another data.prepared"
        )
        problems.append(Problem("data.validation", config.validation, remedy))
    try:
        prepared = open_directory(directory)
    except Refused as refusal:
        raise Refused([*problems, *refusal.problems]) from refusal
    refuse_if_any(problems)
    return prepared


def verify(directory: Path) -> Prepared:
    """Open a prepared directory and check its every byte. Raises `Refused` with each damaged file."""
    verify_files(directory, read_manifest(directory).files)
    return open_directory(directory)
