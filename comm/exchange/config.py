"""Configuration of the token dispatcher."""

from collections.abc import Iterator
from dataclasses import dataclass

from typing_extensions import override

from ..errors import Problem
from ..files.ranges import CheckedConfig, one_of
from .wire_format import WireFormat

EXCHANGE_NAMES = ("flat", "two_hop", "deepep")
_OF_SUMS = (WireFormat.NATIVE, WireFormat.BF16)
_WHY_OF_SUMS = ": sums over experts lose too much in FP8 (report §3.3)"


@dataclass(frozen=True, kw_only=True)
class ExchangeConfig(CheckedConfig):
    """The token dispatcher and the wire format of its four operations: `native` (compute dtype), `bf16` or `fp8`."""

    # The report (§3.3) sends activations and activation gradients to the experts in FP8, and sums of them back in BF16.

    name: str = one_of(EXCHANGE_NAMES, "flat")
    """`flat`: every (token, expert) copy crosses the wire. `two_hop`: a token crosses to a node at most once and is
    forwarded inside it. `deepep`: DeepEP's kernels."""
    dispatch: str = one_of(WireFormat, "native")
    """Format of the tokens on their way to the experts."""
    combine: str = one_of(_OF_SUMS, "native", reason=_WHY_OF_SUMS)
    """Format of the experts' outputs on their way back."""
    combine_backward: str = one_of(WireFormat, "native")
    """Format of the gradients of these outputs on their way to the experts."""
    dispatch_backward: str = one_of(_OF_SUMS, "native", reason=_WHY_OF_SUMS)
    """Format of the tokens' gradients on their way back."""
    check_order: bool = False
    """Debugging aid: before each exchange, compare over all ranks the operation that comes next."""

    @override
    def rule_problems(self) -> Iterator[Problem]:
        if self.name != "deepep":
            return
        # DeepEP has no kernels for other formats.
        for operation in ("dispatch", "combine", "combine_backward", "dispatch_backward"):
            if self.__dict__[operation] == WireFormat.NATIVE:
                hint = "DeepEP moves BF16, and FP8 towards the experts; write bf16, or exchange=deepep for all four"
                yield Problem(operation, "native", hint)
        if self.dispatch != self.combine_backward:
            hint = f"must be {self.dispatch}, like dispatch: DeepEP uses one layout, with one row size, for both"
            yield Problem("combine_backward", self.combine_backward, hint)
