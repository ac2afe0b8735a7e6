"""Windows over tokens: each target once, padding marked, and an order that depends on seed and position only."""

import math

import numpy as np
import pytest
import torch

from shoestring.comm.errors import ConfigError
from shoestring.tests.trainer.data.small_data import split_in_memory
from shoestring.trainer.data.samples import SampleDataset, SampleOrder, permute_indices
from shoestring.trainer.data.shards import TokenSplit

PAD = 9999


def row(tokens: int, shard_tokens: int = 13) -> TokenSplit:
    """Return tokens 0, 1, 2, ..., so that a token tells its position."""
    tokens_T = np.arange(tokens, dtype=np.uint16)
    shards = [tokens_T[i : i + shard_tokens] for i in range(0, tokens, shard_tokens)]
    return split_in_memory("train", shards)


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("tokens", [40, 41, 42, 43, 44, 45, 49])
def test_validation_has_every_token_but_the_first_as_target_once(tokens: int, depth: int) -> None:
    samples = SampleDataset(row(tokens), 8, depth, PAD)
    batch = samples.read_batch(range(len(samples)))
    targets_BS, valid_BS = batch.tokens_BW[:, 1:9], batch.valid_BW[:, :8] & batch.valid_BW[:, 1:9]
    assert targets_BS[valid_BS].tolist() == list(range(1, tokens))
    assert (batch.tokens_BW[~batch.valid_BW] == PAD).all()
    assert (batch.tokens_BW[batch.valid_BW] < tokens).all()
    # At depth d the target of input i is token i + 1 + d, wherever that exists.
    for further in range(1, depth + 1):
        valid = batch.valid_BW[:, 1 + further : 9 + further]
        targets = batch.tokens_BW[:, 1 + further : 9 + further][valid]
        assert targets.tolist() == list(range(1 + further, tokens))


@pytest.mark.parametrize("tokens", [10, 17, 18, 25, 26, 27])
def test_training_takes_whole_windows_only(tokens: int) -> None:
    samples = SampleDataset(row(tokens), 8, 1)
    batch = samples.read_batch(range(len(samples)))
    assert batch.tokens_BW.dtype == torch.int64
    assert batch.tokens_BW.shape == (len(samples), 10)
    assert batch.valid_BW.all()
    assert batch.tokens_BW[:, 0].tolist() == list(range(0, tokens - 9, 8))
    assert (batch.tokens_BW.diff(dim=1) == 1).all()
    assert tokens - (batch.tokens_BW[-1, -1] + 1) < 8  # no further window fits


def test_windows_do_not_depend_on_shard_sizes() -> None:
    whole = SampleDataset(row(500, 500), 16, 1)
    for size in (1, 7, 16, 499):
        cut = SampleDataset(row(500, size), 16, 1)
        assert torch.equal(cut.read_batch([0, 29, 3]).tokens_BW, whole.read_batch([0, 29, 3]).tokens_BW)


def test_a_split_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(ConfigError, match="9 tokens, one sample needs 10"):
        SampleDataset(row(9), 8, 1)
    with pytest.raises(ConfigError, match="1 tokens, one sample needs 2"):
        SampleDataset(row(1), 8, 1, PAD)
    assert len(SampleDataset(row(10), 8, 1)) == len(SampleDataset(row(2), 8, 1, PAD)) == 1


@pytest.mark.parametrize("index", [-1, 31])
def test_samples_that_do_not_exist_are_refused(index: int) -> None:
    samples = SampleDataset(row(500), 16, 1)
    assert len(samples) == 31
    with pytest.raises(IndexError):
        samples.read_batch([index])


def test_the_order_depends_on_neither_processes_nor_restarts() -> None:
    order = SampleOrder(7, 101)
    run = order.sample_indices(0, 400)
    assert run.dtype == np.int64
    for processes in (1, 2, 4, 8):
        share = 8 // processes
        steps = [
            SampleOrder(7, 101).sample_indices(step * 8 + rank * share, share)
            for step in range(50)
            for rank in range(processes)
        ]
        assert np.array_equal(np.concatenate(steps), run)
    assert np.array_equal(SampleOrder(7, 101).sample_indices(237, 163), run[237:])


@pytest.mark.parametrize("samples", [1, 2, 3, 5, 64, 101, 1000])
def test_every_epoch_takes_each_sample_once_in_another_order(samples: int) -> None:
    epochs = SampleOrder(0, samples).sample_indices(0, 5 * samples).reshape(5, samples)
    assert (np.sort(epochs, axis=1) == np.arange(samples)).all()
    if samples >= 64:
        assert len({tuple(epoch) for epoch in epochs}) == 5
        assert not np.array_equal(SampleOrder(1, samples).sample_indices(0, samples), epochs[0])


def test_the_order_never_changes() -> None:
    """Checkpoints rely on it: another permutation would repeat and skip samples of a resumed run."""
    assert SampleOrder(42, 10).sample_indices(0, 20).tolist() == [
        6,
        4,
        9,
        5,
        8,
        1,
        0,
        2,
        7,
        3,
        3,
        1,
        2,
        6,
        0,
        9,
        5,
        7,
        4,
        8,
    ]
    assert SampleOrder(2**80, 2**40).sample_indices(2**50, 2).max() < 2**40


def test_the_shuffle_looks_uniform() -> None:
    """Each of 6 samples lands in each of 6 places equally often; neighbors are scattered."""
    seeds, size = 6000, 6
    positions = np.tile(np.arange(size, dtype=np.uint64), seeds)
    keys = np.repeat(np.arange(seeds, dtype=np.uint64), size)
    places = permute_indices(positions, size, keys).reshape(seeds, size).astype(np.int64)
    counts = np.stack([np.bincount(places[:, position], minlength=size) for position in range(size)])
    deviation = math.sqrt(seeds * (1 / size) * (1 - 1 / size))
    assert abs(counts - seeds / size).max() < 4.5 * deviation
    jumps = np.abs(np.diff(SampleOrder(3, 100_000).sample_indices(0, 100_000)))
    assert abs(jumps.mean() / 100_000 - 1 / 3) < 0.01  # as of two independent uniform places
