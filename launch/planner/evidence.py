"""Which figure stands on what: every assumption of a forecast with its evidence class and source."""

from __future__ import annotations

from collections.abc import Iterator

from ...trainer.config import RunConfig
from ...trainer.costs.cluster import ClusterConfig
from ...trainer.memory.peak import ALL_TO_ALL, CONTEXT
from .forecast import Forecast
from .kernel_times import KernelTable, weakest
from .lanes import ChunkCosts
from .operations import Shape, head_traffic
from .recipe import Precision, Recipe

Evidence = tuple[str, str, str]
"""(what, evidence class, source). `chosen` is what the run's configuration says."""


def assumptions(config: RunConfig, forecast: Forecast, costs: ChunkCosts) -> list[Evidence]:
    """Everything that a forecast rests on."""
    recipe, table, at_best = forecast.recipe, costs.cost.table, forecast.coverage.at_best
    found = [*_times(table, at_best), *_figures(config.cluster), *_choices(recipe)]
    if config.exchange.name == "flat" and forecast.layout.topology.ep > 1 and not table.measured_with:
        found.append(("a row for every expert at the links' pace", "assumed", "no measurement of such an exchange"))
    if recipe.comm_sms:
        found += _lent(config, recipe, table, at_best)
    found += _of_a_trace(at_best) if table.of("sync", "overlapped") else ()
    found += _of_a_cpu() if table.measured_with else _of_kernels(config, recipe, costs.shape)
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


def _outside(recipe: Recipe, expert_ranks: int) -> Iterator[Evidence]:
    """What a GPU's memory holds that no allocator sees."""
    if recipe.on_cpu:
        return
    context = f"CUDA context, libraries and NCCL's communicators {CONTEXT / 1e9:g} GB"
    yield context, "assumed", "no measurement"
    if expert_ranks > 1 and recipe.exchange.name == "deepep":
        yield "DeepEP's buffer", "published", "DeepEP 2.1.0's own formula (comm/exchange/deepep_buffer.py)"
    elif expert_ranks > 1:
        yield f"NCCL's buffers of all-to-alls {ALL_TO_ALL / 1e9:g} GB", "assumed", "no measurement"


def _times(table: KernelTable, at_best: str) -> Iterator[Evidence]:
    rows: dict[tuple[str, str], str] = {}
    for row in table.rows:
        if row.kind == "recipe":
            continue  # says what was measured, and how long nothing takes
        rows.setdefault((f"times: {row.kind}", weakest(row.evidence, at_best)), row.source)
    for (what, evidence), source in rows.items():
        yield what, evidence, source


def _figures(cluster: ClusterConfig) -> Iterator[Evidence]:
    for name, text in cluster.sources.items():
        evidence, _, source = text.partition(": ")
        yield f"cluster.{name}", evidence, source


def _choices(recipe: Recipe) -> Iterator[Evidence]:
    yield f"GEMMs in {recipe.precision.value}", "chosen", "precision"
    yield f"recompute: {recipe.recompute_name}", "chosen", "recompute.parts"
    yield f"exchange: {recipe.exchange_name}", "chosen", "exchange"
    yield f"moments of {recipe.moment_bytes} bytes a parameter", "chosen", "optimizer.moments"


def _lent(config: RunConfig, recipe: Recipe, table: KernelTable, at_best: str) -> Iterator[Evidence]:
    row = table.find("gemm", "lent_sms", "any")
    if row is None:
        return
    what, measured = f"{recipe.comm_sms} SMs lent", int(row.value)
    if recipe.comm_sms == measured:
        yield what, weakest(row.evidence, at_best), row.source
        return
    yield what, "chosen", "exchange" if config.exchange.name == "deepep" else "--comm-sms"
    source = "DeepEP V2's README says so of 6 SMs with 32 ranks; nobody has measured it in this layout"
    yield f"exchanges as fast as with {measured}", "assumed", source


def _of_a_trace(at_best: str) -> Iterator[Evidence]:
    yield "exchanges wait for other ranks beside another chunk only", "assumed", "the trace has no lone chunk"
    yield "messages between stages do not slow exchanges down", "assumed", "the trace leaves pipeline messages out"
    yield "computing is as fast beside an exchange as alone", at_best, "attn(W) of the trace, alone and beside one"


def _of_kernels(config: RunConfig, recipe: Recipe, shape: Shape) -> Iterator[Evidence]:
    program = "the program says when they are final and wanted; the pace is that of the links"
    yield "gradients are summed, and weights handed out, beside computing", "assumed", program
    yield "the head's three GEMMs are in the forward", "chosen", "trainer/model/loss.py"
    moved = head_traffic(shape, recipe) / 1e9
    unfused = f"a kernel that adds its gradient up by itself; loss.py moves {moved:,.3g} GB a micro-batch for it"
    yield "the head's passes over memory are free", "assumed", unfused
    yield "norms and SwiGLU cost the same made again or kept", "assumed", "measured where they are made again"
    if recipe.precision is Precision.FP8:
        yield "FP8 kernels as fast as the table's", "assumed", f"precision.provider = {config.precision.provider}"


def _of_a_cpu() -> Iterator[Evidence]:
    yield "exchanges and sums hide behind nothing", "assumed", "the core that computes does them"


def _fragmentation(recipe: Recipe) -> tuple[str, str]:
    if recipe.fragmentation == Recipe().fragmentation:
        return "assumed", "PithTrain's default"
    return "chosen", "--fragmentation"
