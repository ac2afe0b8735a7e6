"""Which figure stands on what: every assumption of a forecast with its evidence class and source."""

from __future__ import annotations

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
"""(what, evidence class, source). `chosen` is what the run's configuration says."""


def list_assumptions(config: RunConfig, forecast: StepForecast, costs: ChunkTimeModel) -> list[Assumption]:
    """Everything that a forecast rests on."""
    recipe, table, at_best = forecast.recipe, costs.compute_model.table, forecast.evidence_coverage.strongest_evidence
    found = [*_times(table, at_best), *_figures(config.cluster), *_choices(recipe)]
    if config.exchange.name == "flat" and forecast.layout.topology.ep > 1 and not table.measured_recipe:
        found.append(("a row for every expert at the links' pace", "assumed", "no measurement of such an exchange"))
    if recipe.comm_sms:
        found += _lent(config, recipe, table, at_best)
    found += _of_a_trace(at_best) if table.select("sync", "overlapped") else ()
    found += _of_a_cpu() if table.measured_recipe else _of_kernels(config, recipe, costs.shape)
    if config.optimizer.ema_decay is not None:
        found.append(("the weights' moving average costs no time", "assumed", "a thread of the host keeps it"))
    skew = "expert skew" if recipe.skew == 0 else f"expert skew {recipe.skew:g}"
    jitter = "jitter" if recipe.jitter == 0 else f"jitter {recipe.jitter:g}"
    found += [
        ("routing uniform within the node limit", "assumed", "the router's balancing (V3 report §2.1.2)"),
        *_outside(recipe, forecast.layout.topology.ep),
        (f"fragmentation {recipe.fragmentation:.0%} of what comes and goes", *_fragmentation(recipe)),
        (f"{jitter}, {skew}, no failures", "assumed", "explicit inputs"),
    ]
    return found


def _outside(recipe: ForecastRecipe, expert_ranks: int) -> Iterator[Assumption]:
    """What a GPU's memory holds that no allocator sees."""
    if recipe.on_cpu:
        return
    context = f"CUDA context, libraries and NCCL's communicators {CUDA_CONTEXT_BYTES / 1e9:g} GB"
    yield context, "assumed", "no measurement"
    if expert_ranks > 1 and recipe.exchange.name == "deepep":
        yield "DeepEP's buffer", "published", "DeepEP 2.1.0's own formula (comm/exchange/deepep_buffer.py)"
    elif expert_ranks > 1:
        yield f"NCCL's buffers of all-to-alls {NCCL_ALL_TO_ALL_BYTES / 1e9:g} GB", "assumed", "no measurement"


def _times(table: KernelTable, at_best: str) -> Iterator[Assumption]:
    rows: dict[tuple[str, str], str] = {}
    for row in table.rows:
        if row.kind == "recipe":
            continue  # says what was measured, and how long nothing takes
        rows.setdefault((f"times: {row.kind}", weakest_evidence(row.evidence, at_best)), row.source)
    for (what, evidence), source in rows.items():
        yield what, evidence, source


def _figures(cluster: ClusterConfig) -> Iterator[Assumption]:
    for name, text in cluster.sources.items():
        evidence, _, source = text.partition(": ")
        yield f"cluster.{name}", evidence, source


def _choices(recipe: ForecastRecipe) -> Iterator[Assumption]:
    yield f"GEMMs in {recipe.precision.value}", "chosen", "precision"
    yield f"recompute: {recipe.recompute_name}", "chosen", "recompute.modules"
    yield f"exchange: {recipe.exchange_name}", "chosen", "exchange"
    yield f"moments of {recipe.moment_bytes} bytes a parameter", "chosen", "optimizer.moments"


def _lent(config: RunConfig, recipe: ForecastRecipe, table: KernelTable, at_best: str) -> Iterator[Assumption]:
    row = table.find_row("gemm", "lent_sms", "any")
    if row is None:
        return
    what, measured = f"{recipe.comm_sms} SMs lent", int(row.value)
    if recipe.comm_sms == measured:
        yield what, weakest_evidence(row.evidence, at_best), row.source
        return
    yield what, "chosen", "exchange" if config.exchange.name == "deepep" else "--comm-sms"
    source = "DeepEP V2's README says so of 6 SMs with 32 ranks; nobody has measured it in this layout"
    yield f"exchanges as fast as with {measured}", "assumed", source


def _of_a_trace(at_best: str) -> Iterator[Assumption]:
    yield "exchanges wait for other ranks beside another chunk only", "assumed", "the trace has no lone chunk"
    yield "messages between stages do not slow exchanges down", "assumed", "the trace leaves pipeline messages out"
    yield "computing is as fast beside an exchange as alone", at_best, "attn(W) of the trace, alone and beside one"


def _of_kernels(config: RunConfig, recipe: ForecastRecipe, shape: LayerWorkload) -> Iterator[Assumption]:
    program = "the program says when they are final and wanted; the pace is that of the links"
    yield "gradients are summed, and weights handed out, beside computing", "assumed", program
    yield "the head's three GEMMs are in the forward", "chosen", "trainer/model/loss.py"
    moved = head_gradient_bytes(shape, recipe) / 1e9
    unfused = f"a kernel that adds its gradient up by itself; loss.py moves {moved:,.3g} GB a micro-batch for it"
    yield "the head's passes over memory are free", "assumed", unfused
    yield "norms and SwiGLU cost the same made again or kept", "assumed", "measured where they are made again"
    if recipe.precision is GemmPrecision.FP8:
        yield "FP8 kernels as fast as the table's", "assumed", f"precision.fp8_backend = {config.precision.fp8_backend}"


def _of_a_cpu() -> Iterator[Assumption]:
    yield "exchanges and sums hide behind nothing", "assumed", "the core that computes does them"


def _fragmentation(recipe: ForecastRecipe) -> tuple[str, str]:
    if recipe.fragmentation == ForecastRecipe().fragmentation:
        return "assumed", "PithTrain's default"
    return "chosen", "--fragmentation"
