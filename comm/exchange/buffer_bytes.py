"""Bytes of a token exchange's tensors on one rank: what is common to the exchanges, each of which states its own.

Letters: T tokens, K experts per token, R rows received, D hidden size, P ranks.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch

from .config import ExchangeConfig
from .wire_format import RowCodec, WireFormat


@dataclass(frozen=True)
class ExchangeShape:
    """Shape of one layer's token exchange on one rank."""

    config: ExchangeConfig
    ep_size: int
    """P, ranks that share the experts of a layer."""
    tokens: int
    """T, tokens that this rank sends."""
    top_k: int
    """K, experts per token."""
    rows: float
    """R, rows that this rank receives."""
    hidden_size: int
    dtype: torch.dtype
    """Dtype of tokens and rows."""
    fp8_experts: bool
    """True if the experts take FP8 rows as they are."""

    @property
    def fp32_bytes(self) -> int:
        """Bytes per number of gates and sums, which are FP32 or wider."""
        return torch.promote_types(self.dtype, torch.float32).itemsize


@dataclass(frozen=True)
class ExchangeBufferBytes(ABC):
    """Bytes that each operation of a token exchange needs while it runs, including its result."""

    shape: ExchangeShape

    @property
    def expert_row_bytes(self) -> float:
        """Bytes of the experts' inputs, and of their outputs, R × D in the compute dtype."""
        return self.shape.rows * self.shape.hidden_size * self.shape.dtype.itemsize

    @property
    def keeps_rows_in_fp8(self) -> bool:
        """True if rows are dispatched in FP8 and the experts take them in it."""
        return self.shape.fp8_experts and self.shape.ep_size > 1 and self.shape.config.dispatch == WireFormat.FP8

    @property
    def dispatched_row_bytes(self) -> float:
        """Bytes of the rows that a dispatch returns for the experts."""
        fp8_row = self._codec(WireFormat.FP8).payload_bytes_per_row
        return self.shape.rows * fp8_row if self.keeps_rows_in_fp8 else self.expert_row_bytes

    @cached_property
    def dispatch(self) -> float:
        """Bytes of a dispatch: from tokens to rows for the experts with their gates, including the rows."""
        if self.shape.ep_size == 1:
            return self.expert_row_bytes
        codec = self._codec(self.shape.config.dispatch)
        return self._dispatch_bytes(codec, gate=self.shape.fp32_bytes, in_fp8=self.keeps_rows_in_fp8)

    @cached_property
    def combine_backward(self) -> float:
        """Bytes of combine's backward: from gradients of tokens to those of rows, without gates."""
        if self.shape.ep_size == 1:
            return self.expert_row_bytes
        return self._dispatch_bytes(self._codec(self.shape.config.combine_backward), gate=0, in_fp8=False)

    @cached_property
    def combine(self) -> float:
        """Bytes of a combine: from the experts' results to their sums per token, including the sums."""
        return self._combine_or_sum(self.shape.config.combine, gate=0)

    @cached_property
    def dispatch_backward(self) -> float:
        """Bytes of dispatch's backward: from gradients of rows to those of tokens, with gradients of gates."""
        return self._combine_or_sum(self.shape.config.dispatch_backward, gate=self.shape.fp32_bytes)

    @property
    @abstractmethod
    def rows_sent(self) -> float:
        """Mean number of rows that this rank sends, with even routing."""

    @property
    @abstractmethod
    def rows_returned(self) -> float:
        """Number of rows of a combine's messages, before the all-to-all."""

    @abstractmethod
    def _dispatch_bytes(self, codec: RowCodec, *, gate: int, in_fp8: bool) -> float:
        """Return the bytes of a dispatch-like operation over several ranks.

        `gate`: bytes of the gate that is sent with each row. `in_fp8`: rows stay in FP8.
        """

    def _combine_bytes(self, codec: RowCodec, *, gate: int) -> float:
        """Return the bytes of a combine-like operation over several ranks; `gate` as in `_dispatch_bytes`."""
        # Live together: the messages sent, the messages received, with gates the rows without them, and the sums.
        message, sent = codec.payload_bytes_per_row + gate, self.rows_sent
        gateless = sent * codec.payload_bytes_per_row if gate else 0.0
        decoded = sent * self.shape.hidden_size * self.shape.dtype.itemsize if codec.changes_dtype else 0.0
        return self.rows_returned * message + sent * message + gateless + decoded + self._sum_bytes

    def _combine_or_sum(self, format_name: str, *, gate: int) -> float:
        if self.shape.ep_size == 1:
            return self._sum_bytes
        return self._combine_bytes(self._codec(format_name), gate=gate)

    @property
    def _sum_bytes(self) -> float:
        """Bytes of `Permutation.unpermute_and_sum`."""
        shape = self.shape
        sums: float = shape.tokens * shape.hidden_size * shape.fp32_bytes
        if shape.dtype.itemsize == shape.fp32_bytes:
            return sums
        # Rows are widened to FP32 before the sum, and the sums rounded to the compute dtype.
        wide_rows = self.rows_sent * shape.hidden_size * shape.fp32_bytes
        return sums + wide_rows + shape.tokens * shape.hidden_size * shape.dtype.itemsize

    def _codec(self, format_name: str) -> RowCodec:
        return RowCodec(WireFormat(format_name), self.shape.hidden_size, self.shape.dtype)
