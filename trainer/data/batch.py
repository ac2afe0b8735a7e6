"""Samples as tensors.

Shapes: B batch, W window of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...comm.host import to_device


@dataclass(frozen=True)
class TokenBatch:
    """Windows of tokens, and which of them are real."""

    tokens_BW: Tensor
    """int64; `<|pad|>` where nothing is left."""
    valid_BW: Tensor
    """bool; False on padding, which is neither input nor target of any loss."""

    def to(self, device: torch.device) -> TokenBatch:
        """The same batch on `device`."""
        return TokenBatch(to_device(self.tokens_BW, device), to_device(self.valid_BW, device))
