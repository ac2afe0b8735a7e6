"""What a forecast assumes beside the run's configuration; every deviation from a perfect machine is an input here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from ...comm.refusal import Problem


class Precision(StrEnum):
    """In which format the GEMMs of Linears compute."""

    FP8 = "fp8"  # report §3.3: embedding, head, router and attention core stay in BF16
    BF16 = "bf16"
    FP32 = "fp32"

    @property
    def bytes(self) -> int:
        """Of one element as computed with."""
        return {"fp8": 1, "bf16": 2, "fp32": 4}[self.value]


class Recompute(StrEnum):
    """What the backward makes again instead of keeping it."""

    NONE = "none"
    REPORT = "report"  # RMSNorm, MLA up-projections, SwiGLU outputs (report §3.2.3, §3.3.3)
    FULL = "full"  # every compute phase; exchanges are never replayed


class Sync(StrEnum):
    """Where exchanges wait for other ranks as long as the public trace's do."""

    PAIRS = "pairs"  # where it was measured: beside another chunk
    EVERYWHERE = "everywhere"
    NONE = "none"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Defaults are what the report says of DeepSeek-V3's run, and a machine without disturbances.

    All that disturbs a run (`skew` to `slowed`) is an explicit input and never fitted; `shoestring simulate` prints
    what some of them would explain.
    """

    precision: Precision = Precision.FP8
    """Format of the GEMMs; caching of activations follows it."""
    recompute: Recompute = Recompute.REPORT
    """Recomputation in the backward."""
    on_cpu: bool = False
    """Whether ranks compute on CPUs, which keep attention's probabilities."""
    comm_sms: int = 20
    """SMs lent to the exchange (report §3.2.2: 20)."""
    skew: float = 0.0
    """By how much the rank with the most rows is above the mean: its experts' time, and the memory of all, grow so."""
    jitter: float = 0.0
    """Spread of a node's speed as a fraction (standard deviation); the slowest of all nodes sets the pace."""
    sync: Sync = Sync.PAIRS
    """Which exchanges wait for other ranks."""
    imbalance: bool = True
    """Whether stages cost what their layers cost; false: all the mean of them, as no real partition does."""
    edges: bool = True
    """Whether messages between stages take bytes over bandwidth; false: no time."""
    links: float = 1.0
    """Factor on the pace of every link, for what-ifs."""
    message_seconds: float | None = None
    """Of a message between stages, for what-ifs; None: bytes over bandwidth."""
    slowed: tuple[tuple[int, float], ...] = ()
    """Pipeline ranks that take longer by a factor, for what-ifs; negative ranks count from the last."""
    moment_bytes: int = 4
    """Bytes a parameter of both Adam moments: 4 in BF16 (report §3.3.3), 8 in FP32."""

    def problems(self) -> Iterator[Problem]:
        """What is impossible about these values on their own."""
        if not 0 <= self.comm_sms < 132:
            yield Problem("--comm-sms", self.comm_sms, "must be at least 0 and less than the SMs of a GPU")
        for name in ("skew", "jitter"):
            if self.__dict__[name] < 0:
                yield Problem(f"--{name}", self.__dict__[name], "must be at least 0")
