"""A prepared directory in numbers."""

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from shoestring.tests.trainer.data.small_data import edit_parts, refusal, shard, split_in_memory
from shoestring.trainer.data.inspect import describe_prepared_data, unigram_entropy
from shoestring.trainer.data.prepared import open_prepared_directory


def test_the_description_counts_what_is_there(directory: Path) -> None:
    description = describe_prepared_data(directory)
    train, validation = description.splits
    manifest = open_prepared_directory(directory).manifest
    assert (train.first_files, train.documents, train.tokens) == (("a.txt",), 1, manifest.train.tokens)
    assert validation.bytes == len("Of shoes and ships and sealing-wax, of cabbages and kings. " * 5)
    assert 0 < validation.unigram_entropy < np.log(290)
    assert description.excerpt.startswith("The time has come, the walrus said")


def test_a_token_beyond_the_vocabulary_is_refused(directory: Path) -> None:
    """The hashes match, as if the writer of the shard had made them."""
    path = shard(directory, "validation")
    path.write_bytes(b"\xff" * path.stat().st_size)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    edit_parts(directory, lambda parts: parts[1]["validation"]["shards"][0].update(sha256=sha256))
    assert "data.prepared: validation = 65535: is a token of the split" in refusal(describe_prepared_data, directory)


def test_unigram_entropy_is_the_lowest_loss_without_context() -> None:
    tokens_T = np.array([7, 1, 1, 2, 1, 3, 2, 1], dtype=np.uint16)
    split = split_in_memory("validation", [tokens_T])
    shares = [4 / 7, 2 / 7, 1 / 7]  # of 1, 2, 3: the first token is no target
    assert unigram_entropy(split, 8) == pytest.approx(-sum(p * math.log(p) for p in shares), rel=1e-12)
    # The loss of a bias alone is lowest at the logarithms of the frequencies.
    targets = torch.from_numpy(tokens_T[1:].astype(np.int64))
    best_V = torch.tensor([-1e9, *(math.log(p) for p in shares), *([-1e9] * 4)], dtype=torch.float64)

    def loss(logits_V: torch.Tensor) -> float:
        return torch.nn.functional.cross_entropy(logits_V.expand(7, 8), targets).item()

    assert loss(best_V) == pytest.approx(unigram_entropy(split, 8), rel=1e-12)
    assert all(loss(best_V + 0.1 * torch.randn(8, dtype=torch.float64)) > loss(best_V) for _ in range(100))
