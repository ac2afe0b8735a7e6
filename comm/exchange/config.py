"""Configuration of the token dispatcher."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import Problem
from .wire_format import WireFormat

EXCHANGE_NAMES = ("flat", "two_hop", "deepep")


@dataclass(frozen=True, kw_only=True)
class ExchangeConfig:
    """The token dispatcher and the wire format of its four operations: `native` (compute dtype), `bf16` or `fp8`."""

    # The report (§3.3) sends activations and activation gradients to the experts in FP8, and sums of them back in BF16.

    name: str = "flat"
    """`flat`: every (token, expert) copy crosses the wire. `two_hop`: a token crosses to a node at most once and is
    forwarded inside it. `deepep`: DeepEP's kernels."""
    dispatch: str = "native"
    """Format of the tokens on their way to the experts."""
    combine: str = "native"
    """Format of the experts' outputs on their way back; not fp8."""
    combine_backward: str = "native"
    """Format of the gradients of these outputs on their way to the experts."""
    dispatch_backward: str = "native"
    """Format of the tokens' gradients on their way back; not fp8."""
    check_order: bool = False
    """Debugging aid: before each exchange, compare over all ranks the operation that comes next."""

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for each invalid value."""
        if self.name not in EXCHANGE_NAMES:
            yield Problem("name", self.name, f"no such exchange; there are: {', '.join(EXCHANGE_NAMES)}")
        for operation in ("dispatch", "combine", "combine_backward", "dispatch_backward"):
            yield from self._format_problems(operation)
        if self.name == "deepep":
            yield from self._deepep_problems()

    def _format_problems(self, operation: str) -> Iterator[Problem]:
        name = self.__dict__[operation]
        if name not in list(WireFormat):
            yield Problem(operation, name, f"no such format; there are: {', '.join(WireFormat)}")
        elif name == WireFormat.FP8 and operation in ("combine", "dispatch_backward"):
            yield Problem(operation, name, "sums over experts lose too much in FP8 (report §3.3); write bf16 or native")

    def _deepep_problems(self) -> Iterator[Problem]:
        """Yield a problem for each format that DeepEP has no kernels for."""
        for operation in ("dispatch", "combine", "combine_backward", "dispatch_backward"):
            if self.__dict__[operation] == WireFormat.NATIVE:
                hint = "DeepEP moves BF16, and FP8 towards the experts; write bf16, or exchange=deepep for all four"
                yield Problem(operation, "native", hint)
        if self.dispatch != self.combine_backward:
            hint = f"must be {self.dispatch}, like dispatch: DeepEP uses one layout, with one row size, for both"
            yield Problem("combine_backward", self.combine_backward, hint)
