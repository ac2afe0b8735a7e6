"""The loss of a model that knows how often each token occurs and nothing else."""

from __future__ import annotations

import numpy as np

from ...comm.errors import Problem, Refused
from .shards import Split

_PIECE = 2**24  # tokens counted at once: 128 MiB


def unigram_entropy(split: Split, vocabulary: int) -> float:
    """Entropy in nats a token of the token frequencies of a split's targets: all its tokens but the first.

    Those are the tokens that a validation loss is the mean over, and the frequencies are their own, so no model
    without context can reach a lower loss on them. Raises `Refused` for a token beyond the vocabulary.
    """
    counts_V = np.zeros(vocabulary, dtype=np.int64)
    for start in range(1, split.tokens, _PIECE):
        tokens_T = split.read(start, min(start + _PIECE, split.tokens))
        largest = int(tokens_T.max())
        if largest >= vocabulary:
            remedy = f"is a token of the split, and the vocabulary has {vocabulary}; remove the data and prepare again"
            raise Refused([Problem(f"data.prepared: {split.name}", largest, remedy)])
        counts_V += np.bincount(tokens_T, minlength=vocabulary)
    shares_V = counts_V[counts_V > 0] / counts_V.sum()
    return float(-(shares_V * np.log(shares_V)).sum())
