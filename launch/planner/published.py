"""DeepSeek-V3's own figures for its run, to stand beside a forecast. None of the step is an input of one.

The pair of chunks of which DeepSeek has published a trace is another matter: the kernel table is made of that trace, so
its simulated span shows that lanes put together again what was taken apart, and no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ...parallelism.pipeline.executor import interleave
from ...parallelism.pipeline.program import Op
from ...trainer.config import RunConfig
from ...trainer.memory.chunk import StageShape
from ...trainer.model.config import ModelConfig
from .forecast import ParallelLayout, StepForecast
from .recipe import ForecastRecipe
from .stream_simulation import ChunkTimeModel, SimulatedChunk, SimulatedStreams

PUBLISHED_STEP_SECONDS = 19.926
"""Insights paper (arXiv 2505.09343), table 4, MPFT."""
PUBLISHED_PHASE_SECONDS: Mapping[str, float] = MappingProxyType(
    {"1F": 1.13, "bubble": 2.06, "1B": 1.99, "1W": 0.48, "1F1B": 13.95, "opt": 0.29}
)
"""Of that table, in seconds a step; see `seconds_by_published_phase`."""
TRACED_CHUNK_PAIR_SECONDS = 0.129012
"""A forward and a backward of four routed layers (deepseek-ai/profile-data train.json)."""
TRACED_EXPERT_ROWS = ((31_104, 30_976, 36_864, 31_104), (34_688, 32_512, 32_896, 28_416))
"""Rows that reached the traced rank's experts in the four layers of the forward and of the backward."""
PUBLISHED_GLOBAL_BATCH, PUBLISHED_SEQUENCE_LENGTH, PUBLISHED_GPUS = 15_360, 4096, 2048
PUBLISHED_TOKENS = 14_800_000_000_000
PUBLISHED_INITIAL_BATCH = 3072
"""Sequences of the first step (V3 report §4.2)."""
_MODEL = (61, 3, 7168, 256, 8, 2048, 129_280, 1)


def is_deepseek_v3_run(config: RunConfig) -> bool:
    """Whether this is DeepSeek-V3's pre-training, in whatever layout: model, cluster, batch and tokens."""
    training, cluster = config.training, config.cluster
    same = (training.global_batch_size, training.sequence_length, training.tokens) == (
        PUBLISHED_GLOBAL_BATCH,
        PUBLISHED_SEQUENCE_LENGTH,
        PUBLISHED_TOKENS,
    )
    return same and (cluster.name, cluster.total_gpus) == ("h800", PUBLISHED_GPUS) and _size(config.model) == _MODEL


def is_deepseek_v3_layout(config: RunConfig, layout: ParallelLayout, recipe: ForecastRecipe) -> bool:
    """Whether it also computes and is spread as the step that the figures above are of."""
    own, topology = ForecastRecipe(), layout.topology
    fields = ("precision", "recompute", "exchange", "overlap", "moment_bytes", "comm_sms")
    as_reported = all(getattr(recipe, name) == getattr(own, name) for name in fields)
    grid = topology.pp, topology.ep, layout.schedule, layout.micro_batch_size
    return is_deepseek_v3_run(config) and as_reported and grid == (16, 64, "dualpipe", 1)


def seconds_by_published_phase(forecast: StepForecast) -> dict[str, float]:
    """A forecast's seconds in the rows of `PUBLISHED_PHASE_SECONDS`, which are a step without a rest.

    So instructions are with the exchanges that they wait for there, the bubble is every wait for another stage, also
    behind a rank's last instruction, and opt are sums over ranks and the update. `report_view` says the same names of
    what the ledger can tell apart.
    """
    mean = {op: sum(forecast.instruction_seconds(op)) / len(forecast.time_terms_by_rank) for op in Op}
    waits = forecast.program_times.bubble_time_per_rank
    return {
        "1F": mean[Op.F],
        "bubble": sum(waits) / len(waits),
        "1B": mean[Op.I] + mean[Op.B],
        "1W": mean[Op.W],
        "1F1B": mean[Op.FB],
        "opt": forecast.exposed_collective_seconds + forecast.optimizer_seconds,
    }


def _size(model: ModelConfig) -> tuple[int, ...]:
    layers = model.num_hidden_layers, model.first_k_dense_replace, model.hidden_size
    experts = model.n_routed_experts, model.num_experts_per_tok, model.moe_intermediate_size
    return *layers, *experts, model.vocab_size, model.num_nextn_predict_layers


TRACED_STAGE = StageShape(dense_layers=0, moe_layers=4, is_first=False, is_last=False)


def simulate_traced_chunk_pair(costs: ChunkTimeModel, *, use_traced_rows: bool = True) -> SimulatedStreams:
    """Forward and backward of four routed layers in turns; `as_routed`: with the rows that reached the traced rank."""
    forward_rows, backward_rows = TRACED_EXPERT_ROWS if use_traced_rows else ((), ())
    lanes, costs = SimulatedStreams(), costs.with_separate_coverage()  # a look aside, which is no part of the forecast
    parts = costs.shape, costs.compute_model, costs.exchange_model, lanes, True
    interleave(
        SimulatedChunk(TRACED_STAGE, *parts, backward_rows).backward(with_weight_gradients=True),
        SimulatedChunk(TRACED_STAGE, *parts, forward_rows).forward(),
    )
    return lanes


def exposed_communication_share(lanes: SimulatedStreams) -> float:
    """Of the time, in which no kernel runs but an exchange's: waits, and gaps between kernels beside an exchange."""
    return (lanes.exposed_seconds + lanes.overlapped_gap_seconds) / lanes.elapsed_seconds
