"""Description of a prepared directory: sizes, hashes, and an excerpt of its text."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...comm.errors import ConfigError, Problem
from .manifest import DataManifest
from .prepared import verify_prepared_data
from .shards import TokenSplit

_PIECE = 2**24  # tokens counted at once: 128 MiB


def unigram_entropy(split: TokenSplit, vocabulary: int) -> float:
    """Return the entropy in nats per token of the token frequencies of a split's targets: all tokens but the first.

    A validation loss is the mean over the same tokens, so no model without context can reach a lower loss. Raises
    `ConfigError` for a token beyond the vocabulary.
    """
    counts_V = np.zeros(vocabulary, dtype=np.int64)
    for start in range(1, split.num_tokens, _PIECE):
        tokens_T = split.read_tokens(start, min(start + _PIECE, split.num_tokens))
        largest = int(tokens_T.max())
        if largest >= vocabulary:
            hint = f"is a token of the split, and the vocabulary has {vocabulary}; remove the data and prepare again"
            raise ConfigError([Problem(f"data.prepared: {split.name}", largest, hint)])
        counts_V += np.bincount(tokens_T, minlength=vocabulary)
    shares_V = counts_V[counts_V > 0] / counts_V.sum()
    return float(-(shares_V * np.log(shares_V)).sum())


@dataclass(frozen=True)
class SplitDescription:
    """Sizes of one split."""

    name: str
    works: tuple[str, ...]
    documents: int
    tokens: int
    bytes: int
    """UTF-8 bytes of its text."""
    bytes_per_token: float
    shards: int
    unigram_entropy: float
    """Loss of the best model without context, in nats per token."""


@dataclass(frozen=True)
class PreparedDataDescription:
    """Description of a prepared directory in plain values, so that `dataclasses.asdict` gives JSON."""

    directory: str
    fingerprint: str
    digest: str
    vocabulary: int
    dtype: str
    splits: tuple[SplitDescription, ...]
    excerpt: str
    """The first tokens of the training split, decoded."""


def describe_prepared_data(directory: Path, excerpt_tokens: int = 128) -> PreparedDataDescription:
    """Read and verify all of `directory` and describe it. Raises `ConfigError` for damaged files."""
    prepared = verify_prepared_data(directory)
    manifest, train = prepared.manifest, prepared.train
    tokens_T = train.read_tokens(0, min(excerpt_tokens, train.num_tokens))
    return PreparedDataDescription(
        directory=str(directory),
        fingerprint=manifest.fingerprint,
        digest=manifest.content_hash,
        vocabulary=manifest.vocabulary,
        dtype=manifest.dtype,
        splits=(_describe_split(manifest, train), _describe_split(manifest, prepared.validation)),
        excerpt=prepared.tokenizer.decode(tokens_T.tolist()),
    )


def _describe_split(manifest: DataManifest, split: TokenSplit) -> SplitDescription:
    entry = {"train": manifest.train, "validation": manifest.validation}[split.name]
    return SplitDescription(
        name=split.name,
        works=tuple(source.work for source in manifest.sources if source.split == split.name),
        documents=entry.documents,
        tokens=entry.tokens,
        bytes=entry.bytes,
        bytes_per_token=entry.bytes / entry.tokens,
        shards=len(entry.shards),
        unigram_entropy=unigram_entropy(split, manifest.vocabulary),
    )
