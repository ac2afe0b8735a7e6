"""Description of a prepared directory: sizes, hashes, and an excerpt of its text."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...comm.errors import ConfigError, Problem
from .prepared import PreparedData, verify_prepared_data
from .shards import TokenSplit

_PIECE = 2**24  # tokens counted at once: 128 MiB
_MAX_NAMES = 8


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
    files: int
    first_files: tuple[str, ...]
    """Names of the first corpus files, at most 8."""
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
    digest: str
    vocab_size: int
    """One more than the largest token id."""
    dtype: str
    license: str | None
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
        digest=manifest.content_hash,
        vocab_size=manifest.settings.vocab_size,
        dtype=manifest.settings.dtype,
        license=manifest.license,
        splits=(_describe_split(prepared, train), _describe_split(prepared, prepared.validation)),
        excerpt=prepared.tokenizer.decode(tokens_T.tolist()),
    )


def _describe_split(prepared: PreparedData, split: TokenSplit) -> SplitDescription:
    totals, found = prepared.manifest.split(split.name), [part for part in prepared.parts if part.split(split.name)]
    files = sorted({piece.file for part in found for piece in part.pieces})
    return SplitDescription(
        name=split.name,
        files=len(files),
        first_files=tuple(files[:_MAX_NAMES]),
        documents=totals.documents,
        tokens=totals.tokens,
        bytes=totals.bytes,
        bytes_per_token=totals.bytes / totals.tokens,
        shards=len(split.shard_starts) - 1,
        unigram_entropy=unigram_entropy(split, prepared.manifest.settings.vocab_size),
    )
