"""Assumptions of a forecast besides the layout: how the run computes, and deviations from a perfect machine."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from ...comm.errors import Problem
from ...comm.exchange.config import ExchangeConfig
from ...comm.exchange.wire_format import WireFormat
from ...parallelism.pipeline.chunk_walk import ExchangeOperation
from ...trainer.model.recompute import RecomputeModule


class GemmPrecision(StrEnum):
    """Format in which the GEMMs of Linears compute."""

    FP8 = "fp8"  # report §3.3: embedding, head, router and attention core stay in BF16
    BF16 = "bf16"
    FP32 = "fp32"

    @property
    def element_bytes(self) -> int:
        """Bytes of one GEMM input element."""
        return {"fp8": 1, "bf16": 2, "fp32": 4}[self.value]


RECOMPUTE_NOTHING: frozenset[RecomputeModule] = frozenset()
RECOMPUTE_DEEPSEEK_V3 = frozenset({RecomputeModule.NORM, RecomputeModule.UP_PROJECTION, RecomputeModule.SWIGLU})
"""Modules that DeepSeek-V3's run recomputes in the backward (report §3.2.3, and §3.3.3 for SwiGLU)."""
RECOMPUTE_EVERYTHING = frozenset(RecomputeModule)

DEEPSEEK_V3_EXCHANGE = ExchangeConfig(
    name="two_hop",
    dispatch=WireFormat.FP8,
    combine=WireFormat.BF16,
    combine_backward=WireFormat.FP8,
    dispatch_backward=WireFormat.BF16,
)
"""Each token is sent to a node at most once, in the report's formats (§3.3): conf/exchange/two_hop_fp8."""

MIN_COMM_SMS = 6
"""Fewest SMs of a published all-to-all: DeepEP V2's README gives 4 to 6 for DeepSeek-V3's shape."""


class PeerWaits(StrEnum):
    """Exchanges that wait for other ranks for as long as those of the public trace."""

    OVERLAPPED_PAIRS = "pairs"  # where it was measured: exchanges that overlap another chunk
    EVERYWHERE = "everywhere"
    NONE = "none"


@dataclass(frozen=True, kw_only=True)
class ForecastRecipe:
    """Inputs of a forecast; the defaults are those of DeepSeek-V3's report, on a machine without disturbances.

    The first group follows from the run's configuration (`config_adapter.configured_recipe`). Disturbances (`skew` to
    `slowdown_by_pp_rank`) are explicit inputs, never fitted; `shoestring simulate` prints the effect of some of them.
    """

    precision: GemmPrecision = GemmPrecision.FP8
    """Format of the GEMMs; caching of activations follows it."""
    recompute: frozenset[RecomputeModule] = RECOMPUTE_DEEPSEEK_V3
    """Modules that the backward recomputes."""
    exchange: ExchangeConfig = DEEPSEEK_V3_EXCHANGE
    """Token dispatcher and its wire formats."""
    overlap: bool = True
    """Overlap of an FB's forward and backward at each exchange."""
    moment_bytes: int = 4
    """Bytes per parameter of both Adam moments: 4 in BF16 (report §3.3.3), 8 in FP32."""
    averages_weights: bool = False
    """True if the run keeps an average of its weights."""
    expert_block_rows: int | None = None
    """Most rows that a rank's experts compute in one call; None: twice the balanced share."""
    on_cpu: bool = False
    """True for ranks on CPUs, where attention keeps its probabilities for the backward."""

    comm_sms: int = 20
    """SMs reserved for communication (report §3.2.2: 20)."""
    fragmentation: float = 0.1
    """Fraction of the memory allocated within a step that fragmentation adds; PithTrain's default."""
    # One rank with more rows sets the pace of its whole expert-parallel group, for every exchange waits for all its
    # ranks. The most loaded rank changes from step to step, so every rank needs the memory.
    skew: float = 0.0
    """Rows of the most loaded rank over the mean, minus 1; scales expert time and the memory of every rank."""
    jitter: float = 0.0
    """Standard deviation of node speed, as a fraction of the mean; the slowest node sets the pace."""
    peer_waits: PeerWaits = PeerWaits.OVERLAPPED_PAIRS
    """Exchanges that wait for other ranks."""
    uneven_stages: bool = True
    """True: each stage takes the time of its layers. False: every stage takes the mean (a what-if)."""
    p2p_takes_time: bool = True
    """True: a P2P message takes its bytes over the bandwidth. False: no time (a what-if)."""
    link_speed_factor: float = 1.0
    """Factor on the bandwidth of every link, for what-ifs."""
    p2p_seconds: float | None = None
    """Seconds of a P2P message, for what-ifs; None: bytes over bandwidth."""
    slowdown_by_pp_rank: tuple[tuple[int, float], ...] = ()
    """(pipeline rank, time factor) pairs, for what-ifs; negative ranks count from the last."""

    @property
    def high_precision_bytes(self) -> int:
        """Bytes of one element outside FP8 GEMMs."""
        return max(2, self.precision.element_bytes)

    @property
    def recompute_name(self) -> str:
        """Name of the file in conf/recompute with this policy, else the one module it keeps or those it recomputes."""
        known = {RECOMPUTE_NOTHING: "nothing", RECOMPUTE_DEEPSEEK_V3: "deepseek_v3", RECOMPUTE_EVERYTHING: "everything"}
        if len(kept := RECOMPUTE_EVERYTHING - self.recompute) == 1:
            return f"everything but {min(kept)}"
        return known.get(self.recompute, "+".join(part for part in RecomputeModule if part in self.recompute))

    @property
    def exchange_name(self) -> str:
        """Name of the token dispatcher, and the wire format of each of its four operations."""
        exchange = self.exchange
        formats = {name: getattr(exchange, name) for name in ExchangeOperation}
        if len(set(formats.values())) == 1:
            return f"{exchange.name} (all {exchange.dispatch})"
        return f"{exchange.name} ({', '.join(f'{name} {form}' for name, form in formats.items())})"

    def problems(self, sms: int | None, expert_ranks: int) -> Iterator[Problem]:
        """Yield the values that a GPU with `sms` SMs and `expert_ranks` expert-parallel ranks cannot have."""
        if sms is not None and not 0 <= self.comm_sms < sms:
            yield Problem("--comm-sms", self.comm_sms, f"must be at least 0 and less than the {sms} SMs of a GPU")
        elif sms is not None and expert_ranks > 1 and self.comm_sms < MIN_COMM_SMS:
            hint = f"must be at least {MIN_COMM_SMS}: no published all-to-all uses fewer SMs"
            yield Problem("--comm-sms", self.comm_sms, f"{hint} (here over {expert_ranks} ranks)")
        for name in ("skew", "jitter", "fragmentation"):
            if self.__dict__[name] < 0:
                yield Problem(f"--{name}", self.__dict__[name], "must be at least 0")
