"""Bytes of a token exchange's tensors on one rank: see the exchanges in `comm/exchange/`.

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

_GATE = 4  # bytes: DeepEP's gates are FP32


@dataclass(frozen=True)
class ExchangeFormats:
    """How rows travel to the experts and back."""

    ep_size: int = 1
    """Over which the experts of a layer are spread."""
    dispatch_element_bytes: int | None = None
    """Bytes of a number on the way to the experts; None: as it is computed with."""
    combine_element_bytes: int | None = None
    combine_backward_element_bytes: int | None = None
    dispatch_backward_element_bytes: int | None = None
    deduplicates_per_rank: bool = False
    """Whether a token crosses once to each rank that needs it, and not once for each of its experts."""
    has_preallocated_buffer: bool = False
    """Whether rows travel through a buffer that is allocated once, outside of torch's allocator: DeepEP's."""

    @staticmethod
    def from_config(exchange: ExchangeConfig, ranks: int) -> ExchangeFormats:
        """As this exchange sends them."""
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
        """How many rows of one token cross: what even routing gives on average."""
        if not self.deduplicates_per_rank:
            return float(config.num_experts_per_tok)
        return self.ep_size * (1 - (1 - 1 / self.ep_size) ** config.num_experts_per_tok)


@dataclass(frozen=True)
class ExchangeBufferBytes:
    """What each operation needs while it is under way, its result included."""

    config: ModelConfig
    batch: MicroBatchShape
    formats: ExchangeFormats

    @property
    def expert_row_bytes(self) -> float:
        """What the experts receive, and what they give, R × D."""
        return self.batch.received_rows(self.config) * self.config.hidden_size * self.batch.element_bytes

    @property
    def keeps_rows_in_fp8(self) -> bool:
        """Whether rows come in FP8 and stay in it."""
        return self.batch.fp8 and self.formats.ep_size > 1 and self.formats.dispatch_element_bytes == 1

    @property
    def dispatched_row_bytes(self) -> float:
        """What a dispatch leaves for the experts."""
        return self.batch.received_rows(self.config) * self._row(1) if self.keeps_rows_in_fp8 else self.expert_row_bytes

    @cached_property
    def dispatch(self) -> float:
        """Tokens to rows for the experts, with their gates; the rows are among it."""
        if self.formats.ep_size == 1:
            return self.expert_row_bytes
        return self._forth(self.formats.dispatch_element_bytes, beside=True, as_tiles=self.keeps_rows_in_fp8)

    @cached_property
    def combine_backward(self) -> float:
        """The same of gradients, alone."""
        if self.formats.ep_size == 1:
            return self.expert_row_bytes
        return self._forth(self.formats.combine_backward_element_bytes, beside=False, as_tiles=False)

    @cached_property
    def combine(self) -> float:
        """Results to their sums; the sums are among it."""
        return self._back(self.formats.combine_element_bytes, beside=False)

    @cached_property
    def dispatch_backward(self) -> float:
        """The same of gradients, with those of gates."""
        return self._back(self.formats.dispatch_backward_element_bytes, beside=True)

    def _forth(self, element: int | None, *, beside: bool, as_tiles: bool) -> float:
        """What is sent, what arrives, the same by expert, and where something travels beside it the rows alone.

        In `flat` what was sent is gone by then. Rows that stay as they came go to their places at once. DeepEP reads
        the encoded tokens and writes rows and gates to tensors of their own.
        """
        sent, rows = (
            self.batch.tokens * self.formats.rows_sent_per_token(self.config),
            self.batch.received_rows(self.config),
        )
        payload = self._row(element)
        message = payload + (self.batch.fp32_element_bytes if beside else 0)
        alone = rows * payload if beside else 0.0
        decoded = self.expert_row_bytes if element is not None and element != self.batch.element_bytes else 0.0
        if self.formats.has_preallocated_buffer:
            gates = rows * _GATE if beside else 0.0
            encoded = self.batch.tokens * payload if decoded else 0.0
            return encoded + gates + (self.dispatched_row_bytes if as_tiles else rows * payload + decoded)
        if self.formats.deduplicates_per_rank:
            return (
                2 * sent * message
                + sent * payload
                + (self.dispatched_row_bytes if as_tiles else self.expert_row_bytes + decoded)
            )
        placed = self.dispatched_row_bytes if as_tiles else rows * message + alone + decoded
        return rows * message + max(sent * message, placed)

    def _back(self, element: int | None, *, beside: bool) -> float:
        """What is sent, what arrives, and where something travels beside it the rows alone; sums of them in FP32.

        DeepEP reads rows and writes sums, both in BF16, and a gate for each choice of a token.
        """
        if self.formats.has_preallocated_buffer and self.formats.ep_size > 1:
            gates = self.batch.tokens * self.config.num_experts_per_tok * _GATE if beside else 0.0
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
        ):  # what is summed is widened before, and the sums rounded
            sums += (
                sent * self.config.hidden_size * self.batch.fp32_element_bytes
                + self.batch.tokens * self.config.hidden_size * self.batch.element_bytes
            )
        if self.formats.ep_size == 1:
            return sums
        payload = self._row(element)
        message = payload + (self.batch.fp32_element_bytes if beside else 0)
        alone = sent * payload if beside else 0.0
        decoded = (
            sent * self.config.hidden_size * self.batch.element_bytes
            if element not in (None, self.batch.element_bytes)
            else 0.0
        )
        ours = sent if self.formats.deduplicates_per_rank else rows
        return ours * message + sent * message + alone + decoded + sums

    def _row(self, element: int | None) -> float:
        scales = tiles_per_row(self.config.hidden_size) if element == 1 else 0
        return self.config.hidden_size * (self.batch.element_bytes if element is None else element) + scales
