"""What a forecast assumes beside the layout: how the run computes, and every deviation from a perfect machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from ...comm.errors import Problem
from ...comm.exchange.config import ExchangeConfig
from ...comm.exchange.wire_format import WireFormat
from ...trainer.model.recompute import RecomputeModule


class GemmPrecision(StrEnum):
    """In which format the GEMMs of Linears compute."""

    FP8 = "fp8"  # report §3.3: embedding, head, router and attention core stay in BF16
    BF16 = "bf16"
    FP32 = "fp32"

    @property
    def element_bytes(self) -> int:
        """Of one element as computed with."""
        return {"fp8": 1, "bf16": 2, "fp32": 4}[self.value]


RECOMPUTE_NOTHING: frozenset[RecomputeModule] = frozenset()
RECOMPUTE_DEEPSEEK_V3 = frozenset({RecomputeModule.NORM, RecomputeModule.UP_PROJECTION, RecomputeModule.SWIGLU})
"""What DeepSeek-V3's run makes again in the backward (report §3.2.3, and §3.3.3 for SwiGLU)."""
RECOMPUTE_EVERYTHING = frozenset(RecomputeModule)

DEEPSEEK_V3_EXCHANGE = ExchangeConfig(
    name="two_hop",
    dispatch=WireFormat.FP8,
    combine=WireFormat.BF16,
    combine_backward=WireFormat.FP8,
    dispatch_backward=WireFormat.BF16,
)
"""Once a node, in the report's formats (§3.3): conf/exchange/two_hop_fp8."""

MIN_COMM_SMS = 6
"""Of the published exchanges between ranks, none takes fewer: DeepEP V2's README names 4 to 6 for V3's shape."""


class PeerWaits(StrEnum):
    """Where exchanges wait for other ranks as long as the public trace's do."""

    OVERLAPPED_PAIRS = "pairs"  # where it was measured: beside another chunk
    EVERYWHERE = "everywhere"
    NONE = "none"


@dataclass(frozen=True, kw_only=True)
class ForecastRecipe:
    """Defaults are what the report says of DeepSeek-V3's run, and a machine without disturbances.

    The first group follows from the run's configuration: see `configured.recipe_of`. All that disturbs a run (`skew` to
    `slowed`) is an explicit input and never fitted; `shoestring simulate` prints what some of them would explain.
    """

    precision: GemmPrecision = GemmPrecision.FP8
    """Format of the GEMMs; caching of activations follows it."""
    recompute: frozenset[RecomputeModule] = RECOMPUTE_DEEPSEEK_V3
    """What the backward makes again."""
    exchange: ExchangeConfig = DEEPSEEK_V3_EXCHANGE
    """How tokens cross, and in which formats."""
    overlap: bool = True
    """Whether the halves of an FB take turns at each exchange."""
    moment_bytes: int = 4
    """Bytes a parameter of both Adam moments: 4 in BF16 (report §3.3.3), 8 in FP32."""
    expert_block_rows: int | None = None
    """Rows that the experts of a rank compute at once; None: twice the even share."""
    on_cpu: bool = False
    """Whether ranks compute on CPUs, which keep attention's probabilities."""

    comm_sms: int = 20
    """SMs lent to the exchange (report §3.2.2: 20)."""
    fragmentation: float = 0.1
    """What the allocator loses of the memory that comes and goes within a step, as a fraction; PithTrain's default."""
    skew: float = 0.0
    """By how much the rank with the most rows is above the mean: its experts' time, and the memory of all, grow so."""
    jitter: float = 0.0
    """Spread of a node's speed as a fraction (standard deviation); the slowest of all nodes sets the pace."""
    peer_waits: PeerWaits = PeerWaits.OVERLAPPED_PAIRS
    """Which exchanges wait for other ranks."""
    uneven_stages: bool = True
    """Whether stages cost what their layers cost; false: all the mean of them, as no real partition does."""
    p2p_takes_time: bool = True
    """Whether messages between stages take bytes over bandwidth; false: no time."""
    link_speed_factor: float = 1.0
    """Factor on the pace of every link, for what-ifs."""
    p2p_seconds: float | None = None
    """Of a message between stages, for what-ifs; None: bytes over bandwidth."""
    slowdown_by_pp_rank: tuple[tuple[int, float], ...] = ()
    """Pipeline ranks that take longer by a factor, for what-ifs; negative ranks count from the last."""

    @property
    def high_precision_bytes(self) -> int:
        """Bytes of an element outside of FP8 products."""
        return max(2, self.precision.element_bytes)

    @property
    def recompute_name(self) -> str:
        """The file of conf/recompute with this policy, the one part it keeps, or those it makes again."""
        known = {RECOMPUTE_NOTHING: "nothing", RECOMPUTE_DEEPSEEK_V3: "deepseek_v3", RECOMPUTE_EVERYTHING: "everything"}
        if len(kept := RECOMPUTE_EVERYTHING - self.recompute) == 1:
            return f"everything but {min(kept)}"
        return known.get(self.recompute, "+".join(part for part in RecomputeModule if part in self.recompute))

    @property
    def exchange_name(self) -> str:
        """Name and formats of its four operations."""
        exchange = self.exchange
        formats = exchange.dispatch, exchange.combine, exchange.combine_backward, exchange.dispatch_backward
        return " ".join((exchange.name, *formats))

    def problems(self, sms: int | None, expert_ranks: int) -> Iterator[Problem]:
        """What is impossible about these values on a GPU with so many SMs and over so many expert-parallel ranks."""
        if sms is not None and not 0 <= self.comm_sms < sms:
            yield Problem("--comm-sms", self.comm_sms, f"must be at least 0 and less than the {sms} SMs of a GPU")
        elif sms is not None and expert_ranks > 1 and self.comm_sms < MIN_COMM_SMS:
            hint = f"must be at least {MIN_COMM_SMS}: {expert_ranks} expert-parallel ranks exchange, and no published "
            yield Problem("--comm-sms", self.comm_sms, f"{hint}exchange takes fewer")
        for name in ("skew", "jitter", "fragmentation"):
            if self.__dict__[name] < 0:
                yield Problem(f"--{name}", self.__dict__[name], "must be at least 0")
