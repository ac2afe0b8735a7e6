"""Samples of fixed length cut from a split, and the order in which training takes them.

Shapes: B batch, S sequence, D multi-token-prediction depth, W window of tokens = S + 1 + D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ...comm.errors import Problem, Refused
from .batch import TokenBatch
from .permutation import mix, permute
from .shards import Int64Array, Split


@dataclass(frozen=True)
class Samples:
    """Windows that start every S tokens of a split and run over document ends: S inputs, the token after, D more.

    Token 0 is an input only; every other token that a window covers in places 1 to S is a target once. With `pad`,
    the last windows are filled up with it, so that no token is left out; without, only whole windows count.
    """

    split: Split
    sequence_length: int
    mtp_depth: int
    pad: int | None

    @classmethod
    def training(cls, split: Split, sequence_length: int, mtp_depth: int) -> Samples:
        """Whole windows only. Raises `Refused` for a split shorter than one."""
        return cls(split, sequence_length, mtp_depth, None)

    @classmethod
    def validation(cls, split: Split, sequence_length: int, mtp_depth: int, pad: int) -> Samples:
        """Every token but the first is a target once. Raises `Refused` for a split without a target."""
        return cls(split, sequence_length, mtp_depth, pad)

    def __post_init__(self) -> None:
        if len(self) < 1:
            needed = self.window if self.pad is None else 2
            remedy = f"the {self.split.name} split has {self.split.tokens} tokens, one sample needs {needed}"
            raise Refused(
                [Problem("training.sequence_length", self.sequence_length, f"{remedy}; add text or shorten it")]
            )

    @property
    def window(self) -> int:
        """W."""
        return self.sequence_length + 1 + self.mtp_depth

    def __len__(self) -> int:
        tokens = self.split.tokens
        if self.pad is None:
            return max(0, (tokens - self.window) // self.sequence_length + 1)
        return max(0, -((1 - tokens) // self.sequence_length))

    def batch(self, indices: Sequence[int]) -> TokenBatch:
        """Samples by number, [B, W]. Raises `IndexError` outside 0 .. len - 1."""
        tokens_BW = np.full((len(indices), self.window), 0 if self.pad is None else self.pad, dtype=np.int64)
        valid_BW = np.zeros((len(indices), self.window), dtype=np.bool_)
        for row, index in enumerate(indices):
            if not 0 <= index < len(self):
                raise IndexError(f"{self.split.name}: sample {index} of {len(self)}")
            start = index * self.sequence_length
            found_W = self.split.read(start, min(start + self.window, self.split.tokens))
            tokens_BW[row, : len(found_W)] = found_W
            valid_BW[row, : len(found_W)] = True
        return TokenBatch(torch.from_numpy(tokens_BW), torch.from_numpy(valid_BW))


@dataclass(frozen=True)
class SampleOrder:
    """Which sample is the g-th of a run: each epoch takes all of them in a shuffled order of its own.

    A pure function of seed and g, so neither the number of processes nor a restart changes it.
    """

    seed: int
    samples: int

    def indices(self, consumed: int, count: int) -> Int64Array:
        """Numbers of the samples `consumed` .. `consumed + count - 1` of the run, int64 [count]."""
        run = np.arange(consumed, consumed + count, dtype=np.uint64)
        epochs, positions = np.divmod(run, np.uint64(self.samples))
        seed = mix(np.array([self.seed % 2**64], dtype=np.uint64))
        return permute(positions, self.samples, mix(seed ^ mix(epochs))).astype(np.int64)
