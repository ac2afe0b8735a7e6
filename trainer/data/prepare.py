"""Preparation of a corpus: tokenizer and token shards in a directory that appears only when it is complete."""

import errno
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np

from ...comm.errors import ConfigError, Problem, raise_if_any
from .config import DataConfig
from .corpus import describe_ignored_files, read_documents, scan_corpus
from .files import fsync_directory, split_by_size, write_file_durably
from .manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    CorpusFile,
    DataManifest,
    SplitEntry,
    source_fingerprint,
    token_dtype,
)
from .prepared import open_prepared_directory
from .shards import TOKENS_PER_SHARD, SplitWriter
from .tokenizer import Tokenizer, train_tokenizer
from .unfinished_directory import remove_lock, remove_unfinished_directories, unfinished_directory

_UNFINISHED = "preparing"
_BATCH_CHARACTERS = 2**22  # enough text for all cores to encode, little enough for memory


def prepare_corpus(
    config: DataConfig, report: Callable[[str], None], *, shard_tokens: int = TOKENS_PER_SHARD
) -> DataManifest:
    """Create `config.prepared` from the corpus unless it is already prepared; pass progress lines to `report`.

    Raises `ConfigError` for an invalid configuration or corpus, and for a directory that holds anything else.
    """
    # Written to a sibling directory that is renamed when it is complete: a killed preparation leaves nothing that looks
    # like data, and of two concurrent ones the first wins and the other takes its result.
    _check(config, shard_tokens)
    sources = scan_corpus(config)
    wanted = source_fingerprint(sources, config.vocab_size, shard_tokens)
    final = Path(os.path.realpath(config.prepared))
    if _is_occupied(final):
        return _reuse(final, wanted, report)
    total = sum(source.bytes for source in sources)
    if (line := describe_ignored_files(config.corpus_directory)) is not None:
        report(line)
    report(
        f"{len(sources)} files, {total / 1e6:.2f} MB of text; held out for validation: {', '.join(config.validation)}."
    )
    remove_unfinished_directories(final, _UNFINISHED, report)
    with unfinished_directory(final, _UNFINISHED, "data.prepared") as temporary:
        manifest = _write(config, sources, shard_tokens, temporary, report)
        report(f"Wrote {final}")
        if not _publish(temporary, final):
            return _reuse(final, wanted, report)
    return manifest


def _check(config: DataConfig, shard_tokens: int) -> None:
    problems = [problem.with_prefix("data") for problem in config.problems()]
    if shard_tokens < 1:
        problems.append(Problem("shard_tokens", shard_tokens, "must be at least 1"))
    raise_if_any(problems)


def _write(
    config: DataConfig,
    sources: tuple[CorpusFile, ...],
    shard_tokens: int,
    directory: Path,
    report: Callable[[str], None],
) -> DataManifest:
    """Fill an empty directory, the manifest last."""
    start = time.perf_counter()
    texts = (text for source in sources if source.split == "train" for text in _documents(config, source))
    tokenizer = train_tokenizer(texts, config.vocab_size)
    report(f"Tokenizer of {tokenizer.vocab_size} entries trained in {time.perf_counter() - start:.1f} s.")
    splits = {}
    for name in ("train", "validation"):
        start = time.perf_counter()
        split_sources = [source for source in sources if source.split == name]
        split = _write_split(config, split_sources, tokenizer, directory, name, shard_tokens)
        splits[name] = split
        report(
            f"{name}: {split.tokens} tokens, {split.bytes / split.tokens:.2f} bytes per token; documents: "
            f"{split.documents}; shards: {len(split.shards)}; {time.perf_counter() - start:.1f} s."
        )
    manifest = DataManifest(
        format=FORMAT_VERSION,
        fingerprint=source_fingerprint(sources, config.vocab_size, shard_tokens),
        vocabulary=config.vocab_size,
        dtype=token_dtype(config.vocab_size),
        shard_tokens=shard_tokens,
        sources=sources,
        tokenizer=write_file_durably(directory / "tokenizer.json", tokenizer.to_json().encode()),
        train=splits["train"],
        validation=splits["validation"],
    )
    write_file_durably(directory / MANIFEST_FILE, manifest.to_json().encode())
    return manifest


def _write_split(
    config: DataConfig,
    sources: Iterable[CorpusFile],
    tokenizer: Tokenizer,
    directory: Path,
    name: str,
    shard_tokens: int,
) -> SplitEntry:
    dtype = np.dtype(token_dtype(config.vocab_size)).newbyteorder("<")
    documents = (text for source in sources for text in _documents(config, source))
    with closing(SplitWriter(directory, name, dtype, shard_tokens)) as writer:
        for texts in split_by_size(documents, len, _BATCH_CHARACTERS):
            for text, tokens in zip(texts, tokenizer.encode_batch(texts), strict=True):
                writer.add_document([*tokens, tokenizer.end_token_id], len(text.encode()))
        return writer.finish_split()


def _documents(config: DataConfig, source: CorpusFile) -> Iterator[str]:
    return read_documents(config.corpus_directory / source.file)


def _is_occupied(path: Path) -> bool:
    """Return True if `path` exists and is no empty directory: a rename would not replace it."""
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))


def _publish(temporary: Path, final: Path) -> bool:
    """Rename the directory to `final`; return False if another preparation was faster."""
    remove_lock(temporary)
    fsync_directory(temporary)
    try:
        temporary.rename(final)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    fsync_directory(final.parent)
    return True


def _reuse(final: Path, wanted: str, report: Callable[[str], None]) -> DataManifest:
    if not (final / MANIFEST_FILE).exists():
        hint = f"is not empty and has no {MANIFEST_FILE}; name another directory, or remove it"
        raise ConfigError([Problem("data.prepared", str(final), hint)])
    manifest = open_prepared_directory(final).manifest
    if manifest.fingerprint != wanted:
        hint = (
            "holds data made from other text or settings "
            f"({len(manifest.sources)} files, vocabulary {manifest.vocabulary}); name another directory, or remove it"
        )
        raise ConfigError([Problem("data.prepared", str(final), hint)])
    report(f"{final} is already prepared from this text with these settings.")
    return manifest
