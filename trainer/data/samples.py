"""Samples of fixed length from a split, their shuffled order, and batches of them.

The shuffle needs no table: each position of the permutation is computed on request. A run of trillions of tokens has
billions of samples, whose permutation would fill gigabytes on every rank. A Feistel network is a bijection of 2^(2h)
numbers for any round function; results beyond the wanted size are permuted again until they are inside it ("cycle
walking", Black and Rogaway 2002), at most four times on average. Only integer arithmetic is used, so the order is the
same on every machine and with every library version.

Shapes: B batch, S sequence, D multi-token-prediction depth, W window of tokens = S + 1 + D.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from ...comm.errors import ConfigError, Problem
from ...comm.host_transfer import to_device
from .document_random import GOLDEN_RATIO, UInt64Array, splitmix64
from .shards import Int64Array, TokenSplit

T = TypeVar("T")

_ROUNDS = 8
_BLOCK = 4096
"""Samples whose places are computed at once."""
_WORD = 2**64 - 1


def permute_indices(positions: UInt64Array, size: int, keys: UInt64Array) -> UInt64Array:
    """Return the image of each of `positions` (less than `size`) under the permutation of `size` numbers of its key."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    result = _feistel(positions, half, keys)
    while (outside := result >= size).any():
        result[outside] = _feistel(result[outside], half, keys[outside])
    return result


def _feistel(values: UInt64Array, half: int, keys: UInt64Array) -> UInt64Array:
    """Apply a keyed bijection of the numbers of 2 * `half` bits."""
    mask = np.uint64(2**half - 1)
    left, right = values >> np.uint64(half), values & mask
    for number in range(1, _ROUNDS + 1):
        round_keys = splitmix64(keys + np.uint64(number * GOLDEN_RATIO & _WORD))
        left, right = right, left ^ (splitmix64(right ^ round_keys) & mask)
    return (left << np.uint64(half)) | right


@dataclass(frozen=True)
class TokenBatch:
    """Windows of tokens with a mask of valid ones."""

    tokens_BW: Tensor
    """int64 [B, W]; `<|pad|>` past the end of the split."""
    valid_BW: Tensor
    """bool [B, W]; False on padding, which is neither input nor target of any loss."""

    def to(self, device: torch.device) -> "TokenBatch":
        """Return the batch on `device`."""
        return TokenBatch(to_device(self.tokens_BW, device), to_device(self.valid_BW, device))


@dataclass(frozen=True)
class SampleDataset:
    """Windows that start every S tokens of a split and cross document ends: S inputs, the next token, D more.

    Token 0 is only an input; every other token at positions 1 to S of a window is a target once. With `pad_token_id`
    the last windows are padded, so that every token is used, as validation needs; without it only whole windows count,
    as in training. Raises `ConfigError` for a split without one window, or one target if windows are padded.
    """

    split: TokenSplit
    sequence_length: int
    mtp_depth: int
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if len(self) < 1:
            needed = self.tokens_per_sample if self.pad_token_id is None else 2
            hint = f"the {self.split.name} split has {self.split.num_tokens} tokens, one sample needs {needed}"
            hint += "; add text or shorten it"
            raise ConfigError([Problem("training.sequence_length", self.sequence_length, hint)])

    @property
    def tokens_per_sample(self) -> int:
        """Window length W."""
        return self.sequence_length + 1 + self.mtp_depth

    def __len__(self) -> int:
        tokens = self.split.num_tokens
        if self.pad_token_id is None:
            return max(0, (tokens - self.tokens_per_sample) // self.sequence_length + 1)
        return max(0, -((1 - tokens) // self.sequence_length))

    def read_batch(self, indices: Sequence[int]) -> TokenBatch:
        """Return the samples with these indices. Raises `IndexError` outside 0 .. len - 1."""
        samples, width = len(self), self.tokens_per_sample
        tokens_BW = np.empty((len(indices), width), dtype=np.int64)
        valid_BW = np.ones((len(indices), width), dtype=np.bool_)
        for row, index in enumerate(indices):
            if not 0 <= index < samples:
                raise IndexError(f"{self.split.name}: sample {index} of {samples}")
            start = index * self.sequence_length
            count = min(width, self.split.num_tokens - start)
            self.split.read_into(start, tokens_BW[row, :count])
            tokens_BW[row, count:], valid_BW[row, count:] = self.pad_token_id or 0, False
        return TokenBatch(torch.from_numpy(tokens_BW), torch.from_numpy(valid_BW))


@dataclass(frozen=True)
class SampleOrder:
    """Order of a run's samples: each epoch takes all of them in another shuffled order.

    The g-th sample is a pure function of seed and g, so neither the number of processes nor a restart changes it.
    """

    seed: int
    num_samples: int

    def sample_indices(self, consumed: int, count: int) -> Int64Array:
        """Return the indices of samples number `consumed` .. `consumed + count - 1` of the run: int64 [count]."""
        blocks = range(consumed // _BLOCK, (consumed + count - 1) // _BLOCK + 1)
        found = [_shuffled_block(self.seed, self.num_samples, block) for block in blocks]
        first = consumed - blocks.start * _BLOCK
        return np.concatenate([np.empty(0, dtype=np.int64), *found])[first : first + count]


# The network takes 0.6 ms for a few numbers, as it is some hundred calls of NumPy, and 2 ms for a block.
@lru_cache(maxsize=4)
def _shuffled_block(seed: int, num_samples: int, block: int) -> Int64Array:
    run = np.arange(block * _BLOCK, (block + 1) * _BLOCK, dtype=np.uint64)
    epochs, positions = np.divmod(run, np.uint64(num_samples))
    key = splitmix64(np.array([seed % 2**64], dtype=np.uint64))
    return permute_indices(positions, num_samples, splitmix64(key ^ splitmix64(epochs))).astype(np.int64)


class StepPrefetcher(Generic[T]):
    """Reader of what each step needs, one step ahead, in one thread."""

    def __init__(self, read: Callable[[int], T], last_step: int) -> None:
        """Read by `read(step)`, which only this object's thread calls; nothing is read beyond `last_step`."""
        self._read = read
        self._last_step = last_step
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="samples")
        self._ahead: tuple[int, Future[T]] | None = None

    def take(self, step: int) -> T:
        """Return what `step` needs, and begin to read for the next one. Raises what `read` raises."""
        ahead, self._ahead = self._ahead, None
        asked = ahead[1] if ahead is not None and ahead[0] == step else self._thread.submit(self._read, step)
        found = asked.result()
        if step < self._last_step:
            self._ahead = step + 1, self._thread.submit(self._read, step + 1)
        return found

    def close(self) -> None:
        """Stop; what is being read is not waited for."""
        self._thread.shutdown(wait=False, cancel_futures=True)
