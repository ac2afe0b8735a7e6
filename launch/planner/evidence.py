"""Every assumption of a forecast, with its evidence class and source."""

from collections.abc import Iterator

from ...trainer.config import RunConfig
from ...trainer.costs.cluster import ClusterConfig
from ...trainer.memory.peak import CUDA_CONTEXT_BYTES, NCCL_ALL_TO_ALL_BYTES
from .forecast import StepForecast
from .kernel_times import KernelTable, weakest_evidence
from .operations import LayerWorkload, head_gradient_bytes
from .recipe import ForecastRecipe, GemmPrecision
from .stream_simulation import ChunkTimeModel

Assumption = tuple[str, str, str]
"""(assumption, evidence class, source). Class `chosen`: the run's configuration or an option sets it."""


def list_assumptions(config: RunConfig, forecast: StepForecast, costs: ChunkTimeModel) -> list[Assumption]:
    """List the assumptions of a forecast."""
    recipe, table, at_best = forecast.recipe, costs.compute_model.table, forecast.evidence_coverage.strongest_evidence
    found = [*_times(table, at_best), *_figures(config.cluster), *_choices(recipe)]
    if config.exchange.name == "flat" and forecast.layout.topology.ep > 1 and not table.measured_recipe:
        found.append(("one row per token and expert, at link bandwidth", "assumed", "no measurement"))
    if recipe.comm_sms:
        found += _reserved_sms(config, recipe, table, at_best)
    found += _of_a_trace(at_best) if table.select("sync", "overlapped") else ()
    found += [_OF_A_CPU] if table.measured_recipe else _of_kernels(config, recipe, costs.shape)
    if config.optimizer.ema_decay is not None:
        found.append(("the EMA of the weights costs no time", "assumed", "a host thread updates it"))
    skew = "expert skew" if recipe.skew == 0 else f"expert skew {recipe.skew:g}"
    jitter = "jitter" if recipe.jitter == 0 else f"jitter {recipe.jitter:g}"
    found += [
        ("routing uniform within the node limit", "assumed", "the router's balancing (V3 report §2.1.2)"),
        *_outside(recipe, forecast.layout.topology.ep),
        (f"fragmentation {recipe.fragmentation:.0%} of the memory allocated within a step", *_fragmentation(recipe)),
        (f"{jitter}, {skew}, no failures", "assumed", "explicit inputs"),
    ]
    return found


def _outside(recipe: ForecastRecipe, expert_ranks: int) -> Iterator[Assumption]:
    """Memory of a GPU outside torch's allocator."""
    if recipe.on_cpu:
        return
    context = f"CUDA context, libraries and NCCL's communicators {CUDA_CONTEXT_BYTES / 1e9:g} GB"
    yield context, "assumed", "no measurement"
    if expert_ranks > 1 and recipe.exchange.name == "deepep":
        yield "DeepEP's buffer", "published", "DeepEP 2.1.0's formula (comm/exchange/deepep_buffer.py)"
    elif expert_ranks > 1:
        yield f"NCCL's buffers of all-to-alls {NCCL_ALL_TO_ALL_BYTES / 1e9:g} GB", "assumed", "no measurement"


def _times(table: KernelTable, at_best: str) -> Iterator[Assumption]:
    rows: dict[tuple[str, str], str] = {}
    for row in table.rows:
        if row.kind != "recipe":  # names the measured configuration; it is not a time
            rows.setdefault((f"times: {row.kind}", weakest_evidence(row.evidence, at_best)), row.source)
    yield from ((what, evidence, source) for (what, evidence), source in rows.items())


def _figures(cluster: ClusterConfig) -> Iterator[Assumption]:
    for name, text in cluster.sources.items():
        evidence, _, source = text.partition(": ")
        yield f"cluster.{name}", evidence, source


def _choices(recipe: ForecastRecipe) -> Iterator[Assumption]:
    yield f"GEMMs in {recipe.precision.value}", "chosen", "precision"
    yield f"recompute: {recipe.recompute_name}", "chosen", "recompute.modules"
    yield f"token dispatcher: {recipe.exchange_name}", "chosen", "exchange"
    yield f"optimizer state {recipe.moment_bytes} bytes/param", "chosen", "optimizer.moments"


def _reserved_sms(config: RunConfig, recipe: ForecastRecipe, table: KernelTable, at_best: str) -> Iterator[Assumption]:
    row = table.reserved_sms
    if row is None:
        return
    what, measured = f"{recipe.comm_sms} SMs reserved for communication", int(row.value)
    if recipe.comm_sms == measured:
        yield what, weakest_evidence(row.evidence, at_best), row.source
        return
    yield what, "chosen", "exchange" if config.exchange.name == "deepep" else "--comm-sms"
    source = "DeepEP V2's README: so with 6 SMs on 32 ranks; not measured in this layout"
    yield f"all-to-alls as fast as with {measured} SMs", "assumed", source


def _of_a_trace(at_best: str) -> Iterator[Assumption]:
    yield "all-to-alls wait for other ranks only in overlapped pairs", "assumed", "the trace has no lone chunk"
    yield "pipeline sends do not slow all-to-alls down", "assumed", "the trace contains no pipeline sends"
    yield "an all-to-all does not slow computing down", at_best, "attn(W) of the trace, with and without one"


def _of_kernels(config: RunConfig, recipe: ForecastRecipe, shape: LayerWorkload) -> Iterator[Assumption]:
    program = "starts and deadlines from the program, at link bandwidth"
    yield "gradient reduce-scatter and weight all-gather overlap computing", "assumed", program
    yield "all three GEMMs of the head are in the forward", "chosen", "trainer/model/loss.py"
    moved = head_gradient_bytes(shape, recipe) / 1e9
    unfused = f"a fused kernel sums the gradient; trainer/model/loss.py moves {moved:,.3g} GB per micro-batch for it"
    yield "memory passes of the head are free", "assumed", unfused
    yield "norms and SwiGLU cost the same with and without recompute", "assumed", "measured with recompute"
    if recipe.precision is GemmPrecision.FP8:
        yield "FP8 kernels as fast as the table's", "assumed", f"precision.fp8_backend={config.precision.fp8_backend}"


_OF_A_CPU = ("all-to-alls and gradient sums overlap nothing", "assumed", "the computing core runs them")


def _fragmentation(recipe: ForecastRecipe) -> tuple[str, str]:
    if recipe.fragmentation == ForecastRecipe().fragmentation:
        return "assumed", "PithTrain's default"
    return "chosen", "--fragmentation"
