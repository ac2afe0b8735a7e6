"""Bytes of a token exchange's tensors on one rank, for the exchanges in `comm/exchange/`.

Letters: T tokens, R rows received, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ...comm.exchange.config import ExchangeConfig
from ...comm.exchange.wire_format import WireFormat
from ...comm.fp8 import tiles_per_row
from ..model.config import ModelConfig
from .activations import MicroBatchShape

_GATE = 4  # bytes: gates of DeepEP are FP32


@dataclass(frozen=True)
class ExchangeFormats:
    """Wire formats of a token exchange, and the properties of the exchange that decide its memory."""

    ep_size: int = 1
    """Ranks that share the experts of a layer."""
    dispatch_element_bytes: int | None = None
    """Bytes per number of a dispatched row; None: those of the compute dtype."""
    combine_element_bytes: int | None = None
    combine_backward_element_bytes: int | None = None
    dispatch_backward_element_bytes: int | None = None
    deduplicates_per_rank: bool = False
    """True if a token is sent once to each rank that needs it, False if once for each of its experts."""
    has_preallocated_buffer: bool = False
    """True if rows are sent through a buffer allocated once, outside of torch's allocator: DeepEP's."""

    @staticmethod
    def from_config(exchange: ExchangeConfig, ranks: int) -> ExchangeFormats:
        """Return the formats of the configured exchange."""
        sizes = {WireFormat.NATIVE: None, WireFormat.BF16: 2, WireFormat.FP8: 1}
        return ExchangeFormats(
            ep_size=ranks,
            dispatch_element_bytes=sizes[WireFormat(exchange.dispatch)],
            combine_element_bytes=sizes[WireFormat(exchange.combine)],
            combine_backward_element_bytes=sizes[WireFormat(exchange.combine_backward)],
            dispatch_backward_element_bytes=sizes[WireFormat(exchange.dispatch_backward)],
            deduplicates_per_rank=exchange.name != "flat",
            has_preallocated_buffer=exchange.name == "deepep",
        )

    def rows_sent_per_token(self, config: ModelConfig) -> float:
        """Return the mean number of rows sent per token, with even routing."""
        if not self.deduplicates_per_rank:
            return float(config.num_experts_per_tok)
        # Expected number of different ranks among K experts drawn independently: each rank is missed by all K with
        # probability (1 - 1/ep)^K.
        return self.ep_size * (1 - (1 - 1 / self.ep_size) ** config.num_experts_per_tok)


@dataclass(frozen=True)
class ExchangeBufferBytes:
    """Bytes that each operation of a token exchange needs while it runs, including its result."""

    config: ModelConfig
    batch: MicroBatchShape
    formats: ExchangeFormats

    @property
    def expert_row_bytes(self) -> float:
        """Bytes of the experts' inputs, and of their outputs, R × D in the compute dtype."""
        return self.batch.received_rows(self.config) * self.config.hidden_size * self.batch.element_bytes

    @property
    def keeps_rows_in_fp8(self) -> bool:
        """True if rows are dispatched in FP8 and the experts take them in it."""
        return self.batch.fp8 and self.formats.ep_size > 1 and self.formats.dispatch_element_bytes == 1

    @property
    def dispatched_row_bytes(self) -> float:
        """Bytes of the rows that a dispatch returns for the experts."""
        return self.batch.received_rows(self.config) * self._row(1) if self.keeps_rows_in_fp8 else self.expert_row_bytes

    @cached_property
    def dispatch(self) -> float:
        """Bytes of a dispatch: from tokens to rows for the experts with their gates, including the rows."""
        if self.formats.ep_size == 1:
            return self.expert_row_bytes
        return self._dispatch_bytes(
            self.formats.dispatch_element_bytes, with_gates=True, as_tiles=self.keeps_rows_in_fp8
        )

    @cached_property
    def combine_backward(self) -> float:
        """Bytes of combine's backward: from gradients of tokens to those of rows, without gates."""
        if self.formats.ep_size == 1:
            return self.expert_row_bytes
        return self._dispatch_bytes(self.formats.combine_backward_element_bytes, with_gates=False, as_tiles=False)

    @cached_property
    def combine(self) -> float:
        """Bytes of a combine: from the experts' results to their sums per token, including the sums."""
        return self._combine_bytes(self.formats.combine_element_bytes, with_gates=False)

    @cached_property
    def dispatch_backward(self) -> float:
        """Bytes of dispatch's backward: from gradients of rows to those of tokens, with gradients of gates."""
        return self._combine_bytes(self.formats.dispatch_backward_element_bytes, with_gates=True)

    def _dispatch_bytes(self, element: int | None, *, with_gates: bool, as_tiles: bool) -> float:
        """Return the bytes of a dispatch-like operation of numbers of `element` bytes.

        `with_gates`: a gate is sent with each row. `as_tiles`: rows stay in FP8.
        """
        # Live together: the messages sent, the messages received, the rows sorted by expert, and with gates the rows
        # without them.
        sent, rows = (
            self.batch.tokens * self.formats.rows_sent_per_token(self.config),
            self.batch.received_rows(self.config),
        )
        payload = self._row(element)
        message = payload + (self.batch.fp32_element_bytes if with_gates else 0)
        gateless = rows * payload if with_gates else 0.0
        decoded = self.expert_row_bytes if element is not None and element != self.batch.element_bytes else 0.0
        if self.formats.has_preallocated_buffer:
            # DeepEP reads the encoded tokens and writes rows and gates to separate tensors.
            gates = rows * _GATE if with_gates else 0.0
            encoded = self.batch.tokens * payload if decoded else 0.0
            return encoded + gates + (self.dispatched_row_bytes if as_tiles else rows * payload + decoded)
        if self.formats.deduplicates_per_rank:
            return (
                2 * sent * message
                + sent * payload
                + (self.dispatched_row_bytes if as_tiles else self.expert_row_bytes + decoded)
            )
        # `flat` frees what was sent before it sorts; FP8 rows that stay FP8 are sorted without a copy of the messages.
        placed = self.dispatched_row_bytes if as_tiles else rows * message + gateless + decoded
        return rows * message + max(sent * message, placed)

    def _combine_bytes(self, element: int | None, *, with_gates: bool) -> float:
        """Return the bytes of a combine-like operation of numbers of `element` bytes.

        `with_gates`: the gradient of a gate is sent with each row.
        """
        # Live together: the messages sent, the messages received, with gates the rows without them, and sums in FP32.
        if self.formats.has_preallocated_buffer and self.formats.ep_size > 1:
            # DeepEP reads rows and writes sums, both in BF16 (2 bytes), and one gate for each of a token's K experts.
            gates = self.batch.tokens * self.config.num_experts_per_tok * _GATE if with_gates else 0.0
            size: float = 2 * self.batch.tokens
            if self.batch.element_bytes != 2:  # rows and sums are converted
                size += 2 * self.batch.received_rows(self.config) + self.batch.element_bytes * self.batch.tokens
            return gates + size * self.config.hidden_size
        sent, rows = (
            self.batch.tokens * self.formats.rows_sent_per_token(self.config),
            self.batch.received_rows(self.config),
        )
        sums: float = self.batch.tokens * self.config.hidden_size * self.batch.fp32_element_bytes
        if (
            self.batch.element_bytes < self.batch.fp32_element_bytes
        ):  # rows are widened to FP32 before the sum, and the sums rounded to the compute dtype
            sums += (
                sent * self.config.hidden_size * self.batch.fp32_element_bytes
                + self.batch.tokens * self.config.hidden_size * self.batch.element_bytes
            )
        if self.formats.ep_size == 1:
            return sums
        payload = self._row(element)
        message = payload + (self.batch.fp32_element_bytes if with_gates else 0)
        gateless = sent * payload if with_gates else 0.0
        decoded = (
            sent * self.config.hidden_size * self.batch.element_bytes
            if element not in (None, self.batch.element_bytes)
            else 0.0
        )
        arriving = sent if self.formats.deduplicates_per_rank else rows
        return arriving * message + sent * message + gateless + decoded + sums

    def _row(self, element: int | None) -> float:
        scales = tiles_per_row(self.config.hidden_size) if element == 1 else 0
        return self.config.hidden_size * (self.batch.element_bytes if element is None else element) + scales
