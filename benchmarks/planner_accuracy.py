"""Forecasts compared with published measurements: the error of every row that applies, the median and the maximum.

    python benchmarks/planner_accuracy.py [--json benchmarks/results/planner_accuracy.json]

Three sets. DeepSeek-V3 on 2048 H800: nothing is calibrated on a step. Table 4 of Zero Bubble (arXiv 2401.10241): chunk
times are the authors' profile, the programs are the runtime's. DeepSeek-V3 with four layers on 8 B200 (SimuMax
release v1.2): two factors, of computation and of the update, are calibrated on two of its six rows. The FB in
DeepSeek's trace is composed of kernels of the same trace: it tests consistency, and is in no median. All other rows
of `published_measurements.csv` are listed with the reason why they do not apply.
"""

import argparse
import csv
import json
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from shoestring.comm.exchange.config import ExchangeConfig
from shoestring.comm.topology import Topology
from shoestring.launch.planner.forecast import ParallelLayout, StepForecaster
from shoestring.launch.planner.published import (
    exposed_communication_share,
    seconds_by_published_phase,
    simulate_traced_chunk_pair,
)
from shoestring.launch.planner.recipe import RECOMPUTE_NOTHING, ForecastRecipe, GemmPrecision
from shoestring.launch.verbs.simulate import simulate
from shoestring.parallelism.pipeline.communication import derive_p2p_batches
from shoestring.parallelism.pipeline.liveness import peak_instructions
from shoestring.parallelism.pipeline.placement import StageLocation
from shoestring.parallelism.pipeline.schedules.registry import build_program
from shoestring.parallelism.pipeline.simulate import OpDurations, simulate_program

PUBLISHED = Path(__file__).with_name("published_measurements.csv")


@dataclass(frozen=True)
class Comparison:
    """Published number and its forecast."""

    group: str
    row: str
    published: float
    forecast: float
    use: str = "predicted"
    """`predicted`, `calibrated on`, or `consistency` for a forecast from the same data."""

    @property
    def error(self) -> float:
        """Error relative to the published number."""
        return self.forecast / self.published - 1


def read_published() -> dict[str, float]:
    """Return every row with one number, by id."""
    with PUBLISHED.open() as file:
        return {line["id"]: float(line["value"]) for line in csv.DictReader(file)}


def deepseek_v3(published: dict[str, float]) -> Iterator[Comparison]:
    simulation = simulate(["experiment=deepseek_v3_h800"], None, {})
    forecast = simulation.forecast
    own = {f"phase_{name}_s": seconds for name, seconds in seconds_by_published_phase(forecast).items()}
    own |= {
        "step_time_s": forecast.step_seconds,
        "tokens_per_day_B": forecast.global_batch_tokens / forecast.step_seconds * 86_400 / 1e9,
        "tflops_per_gpu_causal": forecast.mfu * forecast.peak_flops_per_gpu / 1e12,
        "mfu_causal_pct": 100 * forecast.mfu,
        "tflops_per_gpu_noncausal": forecast.flops_per_token.main_model_full_attention
        * forecast.tokens_per_second_per_gpu
        / 1e12,
        "mfu_noncausal_pct": 100
        * forecast.flops_per_token.main_model_full_attention
        * forecast.tokens_per_second_per_gpu
        / forecast.peak_flops_per_gpu,
    }
    for metric, value in own.items():
        row = f"dsv3-isca-mpft-{metric}"
        yield Comparison("DeepSeek-V3 step", row, published[row], value)
    row = "dsv3-report-pretrain-gpu_hours"
    yield Comparison("DeepSeek-V3 step", row, published[row], forecast.gpu_hours(14.8e12))
    lanes = simulate_traced_chunk_pair(simulation.forecaster.chunk_time_model(simulation.layout, forecast.recipe))
    exposed = exposed_communication_share(lanes) * lanes.elapsed_seconds * 1e3
    pair = {"chunk_pair_span_ms": (129.012, lanes.elapsed_seconds * 1e3)}
    pair["exposed_comm_ms"] = published["dsv3-trace-exposed_comm_ms"], exposed
    for metric, (traced, composed) in pair.items():
        yield Comparison("H800 trace, from its kernels", f"dsv3-trace-{metric}", traced, composed, "consistency")


@dataclass(frozen=True)
class Profile:
    """Model of Zero Bubble's table 4: microseconds of a rank's chunk as its authors profiled them.

    (p, n, f, b, w, c) in the settings of sail-sg/zero-bubble-pipeline-parallelism's `v_schedule.py`.
    """

    name: str
    ranks: int
    hidden: int
    heads: int
    micro_batch: int
    micro_batches: int
    forward: float
    input_gradient: float
    weight_gradient: float
    transfer: float


PROFILES = (
    Profile("1.5B", 8, 2304, 24, 6, 24, 18522, 18086, 9337, 601),
    Profile("1.5B", 8, 2304, 24, 6, 32, 18513, 18086, 9331, 626),
    Profile("1.5B", 8, 2304, 24, 6, 64, 18546, 18097, 9321, 762),
    Profile("14.6B", 16, 5120, 40, 1, 48, 11347, 11248, 8132, 377),
    Profile("14.6B", 16, 5120, 40, 1, 64, 11307, 11254, 8101, 379),
    Profile("14.6B", 16, 5120, 40, 1, 128, 11325, 11308, 8109, 378),
)
_SCHEDULES = {"f1b": ("1f1b", None), "zb_h1": ("zb_h1", None), "f1bi": ("interleaved", 3)}
_LENGTH, _LAYERS_PER_RANK = 1024, 3  # first and last stage hold one layer less, for embedding and head
_BYTES_PER_PARAMETER = 16  # mixed-precision Adam (ZeRO paper, arXiv 1910.02054, §3.1)


def zero_bubble(published: dict[str, float]) -> Iterator[Comparison]:
    for profile in PROFILES:
        rates = {}
        for name, (schedule, chunks) in _SCHEDULES.items():
            program = build_program(schedule, profile.ranks, profile.micro_batches, chunks)
            part = 1e-6 / (chunks or 1)
            parts = profile.forward * part, profile.input_gradient * part, profile.weight_gradient * part
            seconds = simulate_program(program, OpDurations(*parts), profile.transfer * 1e-6).makespan
            rates[name] = profile.micro_batch * profile.micro_batches / profile.ranks / seconds
        rows = {name: f"zb-{profile.name}-{name}-m{profile.micro_batches}-samples_per_gpu_per_s" for name in _SCHEDULES}
        for name in ("zb_h1", "f1bi"):
            ratio = published[rows[name]] / published[rows["f1b"]]
            yield Comparison("Zero Bubble, throughput over 1F1B", rows[name], ratio, rates[name] / rates["f1b"])
    for profile in (PROFILES[0], PROFILES[3]):
        for name, (schedule, chunks) in _SCHEDULES.items():
            row = f"zb-{profile.name}-{name}-mem-peak_memory_GB"
            yield Comparison("Zero Bubble, memory", row, published[row], _zero_bubble_memory(profile, schedule, chunks))


def _zero_bubble_memory(profile: Profile, schedule: str, chunks: int | None) -> float:
    """Return peak GB per rank: 34 s b h + 5 a s² b bytes per layer (Korthikanti et al., arXiv 2205.05198)."""
    program = build_program(schedule, profile.ranks, profile.micro_batches, chunks)
    tokens = _LENGTH * profile.micro_batch
    layer = 34 * tokens * profile.hidden + 5 * profile.heads * _LENGTH * tokens
    stages, count = program.placement.num_stages, _LAYERS_PER_RANK // program.chunks_per_rank
    worst = 0.0
    for rank, commits in enumerate(derive_p2p_batches(program)):
        held = [program.placement.stage_at(StageLocation(rank, chunk)) for chunk in range(program.chunks_per_rank)]
        layers = [count - (stage in (0, stages - 1)) for stage in held]
        counts = [moment.micro_batches_in_memory for moment in peak_instructions(program, rank, commits)]
        alive = max(sum(n * k for n, k in zip(each, layers, strict=True)) for each in counts)
        static = _BYTES_PER_PARAMETER * 12 * profile.hidden**2 * sum(layers)
        worst = max(worst, alive * layer + static)
    return worst / 1e9


def four_layers(published: dict[str, float]) -> Iterator[Comparison]:
    from shoestring.launch.compose import compose_run_config

    cluster = compose_run_config(["cluster=b200"]).cluster
    v3 = compose_run_config(["model=deepseek_v3", "data.vocab_size=129280"]).model
    model = replace(v3, num_hidden_layers=4, first_k_dense_replace=1, num_nextn_predict_layers=0)
    native = ExchangeConfig(name="two_hop")
    recipe = ForecastRecipe(
        precision=GemmPrecision.BF16, recompute=RECOMPUTE_NOTHING, exchange=native, comm_sms=0, moment_bytes=8
    )
    forecaster = StepForecaster(model, cluster, 4096)
    calibrated = ("ep8_pp1", 4), ("ep8_pp1", 32)
    grids = {"ep8_pp1": (Topology(ep=8), "dp8"), "ep4_pp2": (Topology(pp=2, ep=4), "dp4")}
    halves = {"ep8_pp1": None, "ep4_pp2": (2, 2)}  # as in Megatron: equal layers per stage
    forecasts = {
        (name, count): forecaster.forecast(
            ParallelLayout(topology, "1f1b", layers_per_stage=halves[name]), recipe, count * topology.dp
        )
        for name, (topology, _) in grids.items()
        for count in (4, 8, 32)
    }

    def row(name: str, count: int, metric: str) -> str:
        return f"simumax-b200-deepseekv3_l4_tp1_{name}_{grids[name][1]}_mbc{count}_cef-{metric}"

    first, second = calibrated
    a, b = (forecasts[key].program_times.makespan for key in calibrated)
    update = forecasts[first].exposed_collective_seconds + forecasts[first].optimizer_seconds
    x, y = (published[row(*key, "step_time_ms")] / 1e3 for key in (first, second))
    pace = (y - x) / (b - a)
    rest = (x - pace * a) / update
    print(f"four layers: calibrated factor of computation {pace:.3f}, of the update {rest:.3f}")
    for key, forecast in forecasts.items():
        seconds = pace * forecast.program_times.makespan + rest * (
            forecast.exposed_collective_seconds + forecast.optimizer_seconds
        )
        use = "calibrated on" if key in calibrated else "predicted"
        name = row(*key, "step_time_ms")
        yield Comparison("four layers on 8 B200, time", name, published[name], seconds * 1e3, use)
        name = row(*key, "peak_alloc_GiB_worst_rank")
        allocated = max(memory.allocator_bytes for memory in forecast.memory_by_rank) / 2**30
        yield Comparison("four layers on 8 B200, memory", name, published[name], allocated)


_WHY_NOT = (
    ("zb-1.5B-zb2p", "no ZB-2p among the runtime's schedules"),
    ("zb-14.6B-zb2p", "no ZB-2p among the runtime's schedules"),
    ("zb-", "1F1B is the base of the ratios"),
    ("dsv3-isca-mrft", "the same layout on another network"),
    ("dsv3-report-", "published totals that hold no further layout"),
    ("dsv3-trace-", "an input: the kernel table is made of it"),
    ("deepep-", "an input: exchanges alone"),
    ("isca-fig7-", "an input: exchanges alone"),
    ("mcore-report-dsv3-gb", "no kernel table of GB200 and GB300"),
    ("mcore-report-", "tensor parallelism, which the runtime has not"),
    ("mbridge-epoverlap", "a model without latent attention"),
    ("mbridge-25.09-deepseek", "tensor parallelism, which the runtime has not"),
    ("mbridge-25.09-dsv3", "tensor parallelism, which the runtime has not"),
    ("mbridge-", "a dense model with tensor parallelism"),
    ("zoo-", "a model without latent attention, with tensor parallelism"),
    ("llama405", "failures, not steps"),
    ("byterobust", "failures, not steps"),
    ("smollm3", "a ledger, not steps"),
)


def not_applicable(published: dict[str, float], used: set[str]) -> Counter[str]:
    """Return the number of rows left out, by reason."""
    reasons: Counter[str] = Counter()
    for row in published.keys() - used:
        reasons[next((why for prefix, why in _WHY_NOT if row.startswith(prefix)), "not explained")] += 1
    return reasons


def simulations_per_second() -> float:
    """Return full simulations of V3 on 2048 GPUs per core-second, each with other times: chunks, program and memory.

    The program is built before.
    """
    simulation = simulate(["experiment=deepseek_v3_h800"], None, {})
    began = time.process_time()
    for number in range(40):
        simulation.forecast_with(replace(simulation.forecast.recipe, skew=1e-6 * (number + 1)))
    return 40 / (time.process_time() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    published = read_published()
    found = [*deepseek_v3(published), *zero_bubble(published), *four_layers(published)]
    for group in dict.fromkeys(entry.group for entry in found):
        rows = [entry for entry in found if entry.group == group]
        print(f"\n{group}")
        for entry in rows:
            print(
                f"  {entry.row:<75} {entry.published:>12.4g} {entry.forecast:>12.4g} {entry.error:>+7.1%}  {entry.use}"
            )
        errors = [abs(entry.error) for entry in rows if entry.use == "predicted"]
        if errors:
            both = f"median error {statistics.median(errors):.1%}, worst {max(errors):.1%}"
            print(f"  {both}, of {len(errors)} predicted rows")
    left_out = not_applicable(published, {entry.row for entry in found})
    print("\nrows that do not apply")
    for reason, count in left_out.most_common():
        print(f"  {count:>4}  {reason}")
    rate = simulations_per_second()
    print(f"\n{rate:.0f} full simulations per core-second")
    if options.json is not None:
        rows_tree = [entry.__dict__ | {"error": entry.error} for entry in found]
        tree = {"rows": rows_tree, "left_out": left_out, "simulations_per_second": rate}
        options.json.write_text(json.dumps(tree, indent=1) + "\n")


if __name__ == "__main__":
    main()
