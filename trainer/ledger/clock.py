"""Instants that processes can compare: the launcher and rank 0 write different files of one ledger."""

import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ...comm.files.strict_json import MAX_INTEGER, JsonValue

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def _read_clock(item: JsonValue) -> int:
    return item.as_integer(-MAX_INTEGER)  # a wall clock may be set to anything


@dataclass(frozen=True)
class Instant:
    """Time by the wall clock and the monotonic clock, which is exact within one boot of one machine."""

    wall_ns: Annotated[int, _read_clock]
    """Nanoseconds since the epoch; may jump when the machine's clock is set."""
    monotonic_ns: Annotated[int, _read_clock]
    """Nanoseconds since boot; shared by all processes of a machine."""
    boot: str
    """ID of the boot that the monotonic clock counts from."""

    @staticmethod
    def now() -> "Instant":
        """Return the current instant."""
        boot = _BOOT_ID.read_text()[:8] if _BOOT_ID.exists() else f"{uuid.getnode():x}"
        return Instant(time.time_ns(), time.monotonic_ns(), boot)

    def ns_since(self, earlier: "Instant") -> int:
        """Return the nanoseconds since `earlier`, at least 0: monotonic within one boot, else by the wall clock."""
        if self.boot == earlier.boot:
            return max(0, self.monotonic_ns - earlier.monotonic_ns)
        return max(0, self.wall_ns - earlier.wall_ns)
