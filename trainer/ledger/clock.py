"""Instants that processes can compare: the launcher and rank 0 write different files of one ledger."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Instant:
    """Time by the wall clock and the monotonic clock, which is exact within one boot of one machine."""

    wall_ns: int
    """Nanoseconds since the epoch; may jump when the machine's clock is set."""
    monotonic_ns: int
    """Nanoseconds since boot; shared by all processes of a machine."""
    boot: str
    """ID of the boot that the monotonic clock counts from."""

    @classmethod
    def now(cls) -> Instant:
        """Return the current instant."""
        boot = _BOOT_ID.read_text()[:8] if _BOOT_ID.exists() else f"{uuid.getnode():x}"
        return cls(time.time_ns(), time.monotonic_ns(), boot)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Instant:
        """Return the instant in `record`."""
        return cls(record["wall_ns"], record["monotonic_ns"], record["boot"])

    def to_record(self) -> dict[str, int | str]:
        """Return the instant as keys of a record."""
        return asdict(self)

    def ns_since(self, earlier: Instant) -> int:
        """Return the nanoseconds since `earlier`, at least 0: monotonic within one boot, else by the wall clock."""
        if self.boot == earlier.boot:
            return max(0, self.monotonic_ns - earlier.monotonic_ns)
        return max(0, self.wall_ns - earlier.wall_ns)
