"""Bytes of a token exchange's tensors on one rank: see the exchanges in `comm/exchange/`.

Letters: T tokens, R rows received, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ...comm.exchange.config import ExchangeConfig
from ...comm.exchange.wire import Format
from ...comm.fp8 import tiles_of
from ..model.config import ModelConfig
from .activations import MicroBatch

_GATE = 4  # bytes: DeepEP's gates are FP32


@dataclass(frozen=True)
class ExchangeFormats:
    """How rows travel to the experts and back."""

    ranks: int = 1
    """Over which the experts of a layer are spread."""
    dispatch: int | None = None
    """Bytes of a number on the way to the experts; None: as it is computed with."""
    combine: int | None = None
    combine_backward: int | None = None
    dispatch_backward: int | None = None
    once_a_rank: bool = False
    """Whether a token crosses once to each rank that needs it, and not once for each of its experts."""
    own_buffer: bool = False
    """Whether rows travel through a buffer that is allocated once, outside of torch's allocator: DeepEP's."""

    @staticmethod
    def of(exchange: ExchangeConfig, ranks: int) -> ExchangeFormats:
        """As this exchange sends them."""
        sizes = {Format.NATIVE: None, Format.BF16: 2, Format.FP8: 1}
        return ExchangeFormats(
            ranks=ranks,
            dispatch=sizes[Format(exchange.dispatch)],
            combine=sizes[Format(exchange.combine)],
            combine_backward=sizes[Format(exchange.combine_backward)],
            dispatch_backward=sizes[Format(exchange.dispatch_backward)],
            once_a_rank=exchange.name != "flat",
            own_buffer=exchange.name == "deepep",
        )

    def visited(self, config: ModelConfig) -> float:
        """How many rows of one token cross: what even routing gives on average."""
        if not self.once_a_rank:
            return float(config.num_experts_per_tok)
        return self.ranks * (1 - (1 - 1 / self.ranks) ** config.num_experts_per_tok)


@dataclass(frozen=True)
class Buffers:
    """What each operation needs while it is under way, its result included."""

    config: ModelConfig
    batch: MicroBatch
    wire: ExchangeFormats

    @property
    def rows(self) -> float:
        """What the experts receive, and what they give, R × D."""
        return self.batch.received(self.config) * self.config.hidden_size * self.batch.size

    @property
    def as_tiles(self) -> bool:
        """Whether rows come in FP8 and stay in it."""
        return self.batch.fp8 and self.wire.ranks > 1 and self.wire.dispatch == 1

    @property
    def came(self) -> float:
        """What a dispatch leaves for the experts."""
        return self.batch.received(self.config) * self._row(1) if self.as_tiles else self.rows

    @cached_property
    def dispatch(self) -> float:
        """Tokens to rows for the experts, with their gates; the rows are among it."""
        if self.wire.ranks == 1:
            return self.rows
        return self._forth(self.wire.dispatch, beside=True, as_tiles=self.as_tiles)

    @cached_property
    def combine_backward(self) -> float:
        """The same of gradients, alone."""
        if self.wire.ranks == 1:
            return self.rows
        return self._forth(self.wire.combine_backward, beside=False, as_tiles=False)

    @cached_property
    def combine(self) -> float:
        """Results to their sums; the sums are among it."""
        return self._back(self.wire.combine, beside=False)

    @cached_property
    def dispatch_backward(self) -> float:
        """The same of gradients, with those of gates."""
        return self._back(self.wire.dispatch_backward, beside=True)

    def _forth(self, element: int | None, *, beside: bool, as_tiles: bool) -> float:
        """What is sent, what arrives, the same by expert, and where something travels beside it the rows alone.

        In `flat` what was sent is gone by then. Rows that stay as they came go to their places at once. DeepEP reads
        the encoded tokens and writes rows and gates to tensors of their own.
        """
        sent, rows = self.batch.tokens * self.wire.visited(self.config), self.batch.received(self.config)
        payload = self._row(element)
        message = payload + (self.batch.wide if beside else 0)
        alone = rows * payload if beside else 0.0
        decoded = self.rows if element is not None and element != self.batch.size else 0.0
        if self.wire.own_buffer:
            gates = rows * _GATE if beside else 0.0
            encoded = self.batch.tokens * payload if decoded else 0.0
            return encoded + gates + (self.came if as_tiles else rows * payload + decoded)
        if self.wire.once_a_rank:
            return 2 * sent * message + sent * payload + (self.came if as_tiles else self.rows + decoded)
        placed = self.came if as_tiles else rows * message + alone + decoded
        return rows * message + max(sent * message, placed)

    def _back(self, element: int | None, *, beside: bool) -> float:
        """What is sent, what arrives, and where something travels beside it the rows alone; sums of them in FP32.

        DeepEP reads rows and writes sums, both in BF16, and a gate for each choice of a token.
        """
        if self.wire.own_buffer and self.wire.ranks > 1:
            gates = self.batch.tokens * self.config.num_experts_per_tok * _GATE if beside else 0.0
            size: float = 2 * self.batch.tokens
            if self.batch.size != 2:  # rows and sums are converted
                size += 2 * self.batch.received(self.config) + self.batch.size * self.batch.tokens
            return gates + size * self.config.hidden_size
        sent, rows = self.batch.tokens * self.wire.visited(self.config), self.batch.received(self.config)
        sums: float = self.batch.tokens * self.config.hidden_size * self.batch.wide
        if self.batch.size < self.batch.wide:  # what is summed is widened before, and the sums rounded
            sums += (
                sent * self.config.hidden_size * self.batch.wide
                + self.batch.tokens * self.config.hidden_size * self.batch.size
            )
        if self.wire.ranks == 1:
            return sums
        payload = self._row(element)
        message = payload + (self.batch.wide if beside else 0)
        alone = sent * payload if beside else 0.0
        decoded = sent * self.config.hidden_size * self.batch.size if element not in (None, self.batch.size) else 0.0
        ours = sent if self.wire.once_a_rank else rows
        return ours * message + sent * message + alone + decoded + sums

    def _row(self, element: int | None) -> float:
        scales = tiles_of(self.config.hidden_size) if element == 1 else 0
        return self.config.hidden_size * (self.batch.size if element is None else element) + scales
