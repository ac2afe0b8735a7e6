"""Published figures of DeepSeek-V3's run, for comparison. None of the step's figures is an input of a forecast.

The kernel table comes from the trace of one pair of chunks that DeepSeek published. Comparing the simulated pair with
that trace therefore checks the stream simulation only, not the kernel times.
"""

from collections.abc import Mapping
from types import MappingProxyType

from ...parallelism.pipeline.chunk_walk import StageShape
from ...parallelism.pipeline.instruction import run_instruction
from ...parallelism.pipeline.program import Op
from ...trainer.config import RunConfig
from .forecast import ParallelLayout, StepForecast
from .recipe import ForecastRecipe
from .stream_simulation import ChunkTimeModel, SimulatedChunk, SimulatedStreams

PUBLISHED_STEP_SECONDS = 19.926
"""Insights paper (arXiv 2505.09343), table 4, MPFT."""
PUBLISHED_PHASE_SECONDS: Mapping[str, float] = MappingProxyType(
    {"1F": 1.13, "bubble": 2.06, "1B": 1.99, "1W": 0.48, "1F1B": 13.95, "opt": 0.29}
)
"""Phases of that table in seconds per step; see `seconds_by_published_phase`."""
TRACED_CHUNK_PAIR_SECONDS = 0.129012
"""Seconds of a forward and a backward chunk of four MoE layers (deepseek-ai/profile-data train.json)."""
TRACED_EXPOSED_SHARE = 0.033
"""Share of those seconds in which only an exchange's kernel runs."""
TRACED_EXPERT_ROWS = ((31_104, 30_976, 36_864, 31_104), (34_688, 32_512, 32_896, 28_416))
"""Rows that reached the traced rank's experts, per layer, in the forward and in the backward."""
PUBLISHED_GLOBAL_BATCH, PUBLISHED_SEQUENCE_LENGTH, PUBLISHED_GPUS = 15_360, 4096, 2048
PUBLISHED_TOKENS = 14_800_000_000_000
PUBLISHED_INITIAL_BATCH = 3072
"""Sequences in the first step (V3 report §4.2)."""
_MODEL = {
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "vocab_size": 129_280,
    "num_nextn_predict_layers": 1,
}


def is_deepseek_v3_run(config: RunConfig) -> bool:
    """Return whether model, cluster, batch and tokens are those of DeepSeek-V3's pre-training, in any layout."""
    training, cluster = config.training, config.cluster
    run = training.global_batch_size, training.sequence_length, training.tokens, cluster.name, cluster.total_gpus
    reported = PUBLISHED_GLOBAL_BATCH, PUBLISHED_SEQUENCE_LENGTH, PUBLISHED_TOKENS, "h800", PUBLISHED_GPUS
    return run == reported and _MODEL.items() <= vars(config.model).items()


def is_deepseek_v3_layout(config: RunConfig, layout: ParallelLayout, recipe: ForecastRecipe) -> bool:
    """Return whether run, layout and recipe are those of the published step."""
    reported, topology = ForecastRecipe(), layout.topology
    fields = ("precision", "recompute", "exchange", "overlap", "moment_bytes", "comm_sms")
    as_reported = all(getattr(recipe, name) == getattr(reported, name) for name in fields)
    grid = topology.pp, topology.ep, layout.schedule, layout.micro_batch_size
    return is_deepseek_v3_run(config) and as_reported and grid == (16, 64, "dualpipe", 1)


def seconds_by_published_phase(forecast: StepForecast) -> dict[str, float]:
    """Return a forecast's seconds in the rows of `PUBLISHED_PHASE_SECONDS`, which add up to a step.

    Instructions include the exchanges they wait for; `bubble` is all waiting for other stages, also after a rank's last
    instruction; `opt` is exposed gradient and weight collectives plus the update. `StepForecast.deepseek_report_terms`
    gives these names to what the ledger can measure.
    """
    # The paper does not say which rank it shows, nor whether 1W includes the W of full backwards: the mean over ranks
    # is compared, and 1B + 1W together is the safer comparison.
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


TRACED_STAGE = StageShape(dense_layers=0, moe_layers=4, is_first=False, is_last=False)


def simulate_traced_chunk_pair(costs: ChunkTimeModel, *, use_traced_rows: bool = True) -> SimulatedStreams:
    """Simulate the traced pair: forward and backward of four MoE layers, overlapped.

    `use_traced_rows`: give the experts the rows that they had in the trace, not the balanced number.
    """
    forward_rows, backward_rows = TRACED_EXPERT_ROWS if use_traced_rows else ((), ())
    # The comparison must not count in the forecast's evidence shares.
    streams, costs = SimulatedStreams(), costs.with_separate_coverage()
    forward, backward = (
        SimulatedChunk(TRACED_STAGE, costs, streams, wait_for_peers=True, routed_rows_by_layer=rows)
        for rows in (forward_rows, backward_rows)
    )
    run_instruction(Op.FB, forward, backward)
    return streams


def exposed_communication_share(streams: SimulatedStreams) -> float:
    """Return the fraction of time in which only an exchange's kernel runs: exposed waits and overlapped launch gaps."""
    return (streams.exposed_seconds + streams.overlapped_gap_seconds) / streams.elapsed_seconds
