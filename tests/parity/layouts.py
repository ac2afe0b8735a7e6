"""The layouts under test, and the weights, tokens and constants that a layout and its reference start from.

Letters: B batch (of a global batch, or of one micro-batch), S sequence, W window (S + 1 + MTP depth), E experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import cycle, product

import torch
from torch import Tensor

from shoestring.comm.exchange.wire_format import WireFormat
from shoestring.comm.topology import Topology
from shoestring.parallelism.pipeline.schedules.registry import SCHEDULES, build_placement
from shoestring.tests.reference.configs import random_params, reference_configs
from shoestring.tests.reference.deepseek_v3 import BIAS, ReferenceConfig
from shoestring.tests.trainer.model.released import model_config
from shoestring.trainer.model.recompute import RecomputeModule
from shoestring.trainer.model.stage_layout import StageLayout

STEPS = 3
SEQUENCE_LENGTH = 12
BIAS_SPEED = 0.05
# AdamW divides the scale of a gradient away unless eps is as large as the gradient.
ADAM_EPS = 1e-2
# Where sequence after sequence ends, as the end of a slice of its window: None is all of it, -1 all but the last token.
RAGGED_ENDS = (None, 9, 0, 5, -1, 2, 7, 1)
# Far below any affinity (0 to 1): an expert with this bias is never chosen.
NEVER = -100.0


class Padding(StrEnum):
    """Positions that are not tokens."""

    NONE = "full"
    RAGGED = "ragged"  # sequences end at different places, one in eight has no token at all
    EMPTY = "empty"  # the last micro-batch of the last rank has no token, and one sequence ends early


class Load(StrEnum):
    """The expert load."""

    EVEN = "even"
    IDLE = "idle"  # the last rank of each expert-parallel group receives no row
    BUSY = "busy"  # the last rank of each expert-parallel group receives every row
    UNUSED = "unused"  # every second expert is never chosen


@dataclass(frozen=True)
class Layout:
    """One row of the table."""

    ep: int
    edp: int
    micro_batches: int
    mtp: int
    padding: Padding = Padding.NONE
    load: Load = Load.EVEN
    dtype: torch.dtype = torch.float64
    layers: int = 3
    """Layers of the main model. The first is dense."""
    exchange: str = "flat"
    node_size: int = 8
    """GPUs per node."""
    pp: int = 1
    schedule: str = "1f1b"
    overlap: bool = True
    """Overlap the two halves of an FB."""
    recompute: frozenset[RecomputeModule] = frozenset()
    """Modules that the backward recomputes."""
    fp8: bool = False
    """Compute every Linear except the head in FP8, with the reference backend."""
    wire: WireFormat = WireFormat.NATIVE
    """Wire format of tokens on their way to the experts."""
    growth: int = 0
    """Micro-batches that each step adds to the one before."""
    block: int | None = None
    """Rows that the experts of a rank compute together; None for all."""

    @property
    def name(self) -> str:
        """The name shown in output and matched by pytest's -k."""
        dtype = "fp64" if self.dtype == torch.float64 else "fp32"
        parts = (
            f"pp{self.pp}",
            f"ep{self.ep}",
            f"edp{self.edp}",
            f"mb{self.micro_batches}",
            f"mtp{self.mtp}",
            f"layers{self.layers}",
        )
        place = f"{self.exchange:7} nodes of {self.node_size}"
        return " ".join(
            (
                *parts,
                f"{self.padding:6}",
                f"{self.load:6}",
                dtype,
                place,
                self.schedule,
                *([] if self.overlap else ["serial"]),
                *(["recompute", "+".join(sorted(self.recompute))] if self.recompute else []),
                *(["fp8"] if self.fp8 else []),
                *([] if self.wire is WireFormat.NATIVE else [f"wire {self.wire}"]),
                *([f"growing by {self.growth}"] if self.growth else []),
                *([] if self.block is None else [f"blocks of {self.block}"]),
            )
        )

    @property
    def tolerance(self) -> float:
        """Largest relative error of any floating-point quantity."""
        return 1e-10 if self.dtype == torch.float64 else 5e-6

    @property
    def topology(self) -> Topology:
        """The grid of ranks."""
        return Topology(pp=self.pp, ep=self.ep, edp=self.edp, gpus_per_node=self.node_size)

    @property
    def stages(self) -> StageLayout:
        """The layers of each pipeline stage."""
        return StageLayout.build(model_config(self.config), SEQUENCE_LENGTH, self.schedule, self.pp)

    @property
    def config(self) -> ReferenceConfig:
        """A small model; balance loss and MTP weigh enough to be seen."""
        return replace(reference_configs()["full"], num_nextn_predict_layers=self.mtp, num_hidden_layers=self.layers)

    @property
    def sequences_per_micro_batch(self) -> int:
        """B of one micro-batch on one rank; the global batch has at least four sequences."""
        return 4 if self.topology.dp * self.micro_batches == 1 else 2

    def micro_batches_of(self, step: int) -> int:
        """Return the micro-batches per rank in `step`, from 0."""
        return self.micro_batches + step * self.growth

    def sequences_of(self, step: int) -> int:
        """Return B of the global batch of this step."""
        return self.topology.dp * self.micro_batches_of(step) * self.sequences_per_micro_batch


def learning_rate(step: int) -> float:
    """Return a different rate for each step, from 0."""
    return 0.01 * (step + 1)


def clip_norm(step: int) -> float:
    """Return a limit below the norms of the first two steps, so that an error of the norm moves weights; then above."""
    return 0.5 if step < 2 else 1000.0


def start_params(layout: Layout) -> dict[str, Tensor]:
    """Return initial parameters by released name, in the layout's dtype; routing biases are FP32 and set the load."""
    params = random_params(layout.config, seed=17, dtype=layout.dtype)
    experts = layout.config.n_routed_experts
    of_last_rank_E = torch.arange(experts) >= experts - experts // layout.ep
    banned_E = {
        Load.EVEN: torch.zeros(experts, dtype=torch.bool),
        Load.IDLE: of_last_rank_E,
        Load.BUSY: ~of_last_rank_E,
        Load.UNUSED: torch.arange(experts) % 2 == 1,
    }[layout.load]
    for name, value in params.items():
        if name.endswith(BIAS):
            value[banned_E] = NEVER
    return params


def global_batch(layout: Layout, step: int) -> tuple[Tensor, Tensor]:
    """Return tokens and valid positions of one step, each [B, W]. Padding is random tokens that must have no effect."""
    window = SEQUENCE_LENGTH + 1 + layout.mtp
    generator = torch.Generator().manual_seed(100 + step)
    tokens_BW = torch.randint(0, layout.config.vocab_size, (layout.sequences_of(step), window), generator=generator)
    valid_BW = torch.ones_like(tokens_BW, dtype=torch.bool)
    if layout.padding is Padding.RAGGED:
        valid_BW[:] = False
        for index in range(layout.sequences_of(step)):
            valid_BW[index, : RAGGED_ENDS[(index + step) % len(RAGGED_ENDS)]] = True
    elif layout.padding is Padding.EMPTY:
        valid_BW[step % layout.sequences_per_micro_batch, 9:] = False
        valid_BW[-layout.sequences_per_micro_batch :] = False
    return tokens_BW, valid_BW


REPORT = frozenset({RecomputeModule.NORM, RecomputeModule.UP_PROJECTION, RecomputeModule.SWIGLU})
EVERYTHING = frozenset(RecomputeModule)
_RAGGED, _EMPTY = Padding.RAGGED, Padding.EMPTY
_IDLE, _BUSY, _UNUSED = Load.IDLE, Load.BUSY, Load.UNUSED
_FP32 = torch.float32

QUICK = (
    Layout(1, 1, 1, 0),
    Layout(1, 1, 2, 1, _RAGGED),
    Layout(1, 2, 1, 1, _RAGGED),
    Layout(2, 1, 1, 0, _RAGGED, layers=2),
    Layout(2, 1, 1, 1),
    Layout(2, 1, 2, 1, _RAGGED),
    Layout(2, 1, 3, 2, _RAGGED, dtype=_FP32),
    Layout(2, 2, 1, 1, _RAGGED),
    Layout(4, 1, 1, 2, _RAGGED, _IDLE),
    Layout(4, 1, 2, 1, _RAGGED, exchange="two_hop", node_size=2),
    # Each schedule once. The last stage of a unidirectional pipeline has another embedding for MTP.
    Layout(1, 1, 4, 1, _RAGGED, pp=2, schedule="gpipe"),
    Layout(1, 2, 3, 1, _EMPTY, pp=2, schedule="1f1b"),
    Layout(1, 1, 4, 2, _RAGGED, pp=2, layers=5, schedule="interleaved"),
    Layout(2, 1, 4, 0, _RAGGED, pp=2, schedule="zb_h1", dtype=_FP32),
    Layout(1, 1, 3, 1, _RAGGED, schedule="dualpipev"),
    Layout(2, 1, 5, 1, _EMPTY, pp=2, layers=4, schedule="dualpipev", exchange="two_hop", node_size=1),
    Layout(1, 1, 8, 1, _RAGGED, pp=4, layers=5, schedule="dualpipe"),
    Layout(2, 1, 4, 2, _RAGGED, _IDLE, pp=2, schedule="dualpipe", dtype=_FP32),
    # Optimizer state over replicas in a pipeline: two per stage, then four of two mirrored stages, idle experts too.
    Layout(1, 2, 4, 1, _RAGGED, pp=2, schedule="zb_h1", dtype=_FP32),
    Layout(1, 2, 4, 1, _RAGGED, _UNUSED, pp=2, layers=4, schedule="dualpipev"),
    Layout(1, 2, 4, 1, _EMPTY, _UNUSED, pp=2, schedule="dualpipe"),
    # One rank receives every row and computes them in blocks.
    Layout(4, 1, 2, 1, _EMPTY, _BUSY, block=128),
    # The backward recomputes activations: with FB, and with I separate from W.
    Layout(2, 1, 5, 1, _RAGGED, layers=4, schedule="dualpipev", exchange="two_hop", node_size=1, recompute=REPORT),
    Layout(1, 1, 4, 1, _EMPTY, pp=2, schedule="zb_h1", recompute=EVERYTHING),
    # The batch grows from step to step, so each step runs another program.
    Layout(1, 2, 2, 1, _RAGGED, pp=2, schedule="1f1b", growth=1),
    Layout(2, 1, 4, 1, _EMPTY, pp=2, schedule="dualpipe", growth=2),
    Layout(1, 1, 2, 0, _RAGGED, pp=2, layers=4, schedule="interleaved", growth=2, dtype=_FP32),
)

_GRIDS = ((2, 1, 1), (2, 2, 1), (2, 1, 2), (4, 1, 1), (2, 2, 2))
"""pp, ep, edp."""


def _pipelines() -> Iterator[Layout]:
    """Yield every schedule on every grid, with and without MTP, in FP64 and FP32; padding alternates."""
    paddings = cycle(Padding)
    for schedule in (each.name for each in SCHEDULES):
        for (pp, ep, edp), mtp, dtype in product(_GRIDS, (0, 1), (torch.float64, _FP32)):
            stages = build_placement(schedule, pp).num_stages
            yield Layout(
                ep, edp, 2 * pp, mtp, next(paddings), pp=pp, schedule=schedule, dtype=dtype, layers=max(3, stages)
            )


def _recomputed() -> Iterator[Layout]:
    """Yield every schedule with both exchanges, the report's policy and the largest policy; loads alternate."""
    loads = cycle(Load)
    for schedule in (each.name for each in SCHEDULES):
        stages = build_placement(schedule, 2).num_stages
        for exchange, recompute in product(("flat", "two_hop"), (REPORT, EVERYTHING)):
            yield Layout(
                2, 1, 4, 1, _RAGGED, next(loads), pp=2, schedule=schedule, layers=max(3, stages), exchange=exchange,
                node_size=1, recompute=recompute,
            )  # fmt: skip


SLOW = (
    # One process: micro-batches, MTP and padding alone.
    Layout(1, 1, 3, 2, _RAGGED, _UNUSED),
    Layout(1, 1, 3, 2, _EMPTY, dtype=_FP32),
    # Data parallel: every rank holds every expert.
    Layout(1, 2, 2, 0, _EMPTY, _UNUSED),
    Layout(1, 2, 2, 2, _RAGGED, dtype=_FP32),
    Layout(1, 2, 3, 1),
    # Two ranks share the experts.
    Layout(2, 1, 2, 2, _EMPTY, _IDLE),
    Layout(2, 1, 3, 0, load=_BUSY),
    Layout(2, 1, 1, 2, load=_UNUSED),
    Layout(2, 1, 1, 1, _EMPTY, _BUSY, dtype=_FP32),
    # Four ranks share the experts.
    Layout(4, 1, 1, 1),
    Layout(4, 1, 2, 1, _EMPTY, _BUSY),
    Layout(4, 1, 3, 0, _RAGGED, _UNUSED),
    Layout(4, 1, 3, 1, load=_IDLE),
    Layout(4, 1, 2, 2, _RAGGED, dtype=_FP32),
    Layout(4, 1, 1, 0, _EMPTY, _IDLE, dtype=_FP32),
    # Two ranks share the experts, and there are two replicas of these.
    Layout(2, 2, 1, 2, _RAGGED, _BUSY),
    Layout(2, 2, 2, 0, _EMPTY, _IDLE),
    Layout(2, 2, 3, 1, _RAGGED, _UNUSED),
    Layout(2, 2, 2, 1, dtype=_FP32),
    Layout(2, 2, 1, 2, _EMPTY, _UNUSED, dtype=_FP32),
    # Each token crosses between nodes once.
    Layout(2, 1, 2, 1, _EMPTY, exchange="two_hop", node_size=1),
    Layout(4, 1, 1, 2, _EMPTY, _IDLE, exchange="two_hop", node_size=2),
    Layout(4, 1, 3, 0, _RAGGED, _BUSY, exchange="two_hop", node_size=1),
    Layout(4, 1, 2, 1, _RAGGED, exchange="two_hop"),
    Layout(2, 2, 2, 1, _RAGGED, _UNUSED, exchange="two_hop", node_size=1),
    Layout(4, 1, 2, 2, _RAGGED, dtype=_FP32, exchange="two_hop", node_size=2),
    # One rank receives every row and computes them in blocks: FB, and I separate from W.
    Layout(4, 1, 4, 1, _RAGGED, _BUSY, layers=4, schedule="dualpipev", recompute=REPORT, block=128),
    Layout(4, 1, 4, 1, _RAGGED, _BUSY, pp=2, schedule="zb_h1", dtype=_FP32, block=128),
    # Eight processes.
    Layout(4, 2, 1, 1, _RAGGED, exchange="two_hop", node_size=2),
    Layout(4, 2, 2, 1, _RAGGED, _IDLE),
    Layout(4, 2, 1, 2, _EMPTY, dtype=_FP32),
    *_pipelines(),
    *_recomputed(),
)
