"""What a communication belongs to: the words by which orders are compared and failures are reported."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Label:
    """The place in the model and in the batch that an exchange serves."""

    layer: str
    """Such as `layer_03` or `mtp_01`."""
    micro_batch: int
    """Number within the step, on this rank."""

    def __str__(self) -> str:
        return f"{self.layer}, micro-batch {self.micro_batch}"


@dataclass(frozen=True)
class Call:
    """One operation of the token exchange, for one layer and micro-batch."""

    operation: str
    label: Label

    def __str__(self) -> str:
        return f"{self.operation} of {self.label}"
