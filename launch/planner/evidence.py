"""Which figure stands on what: every assumption of a forecast with its evidence class and source."""

from __future__ import annotations

from .forecast import Forecast
from .recipe import Precision, Recompute
from .tables import Table


def assumptions(forecast: Forecast, table: Table, sources: dict[str, str]) -> list[tuple[str, str, str]]:
    """(what, evidence, source) of everything that a forecast rests on."""
    recipe = forecast.recipe
    rows: dict[tuple[str, str], str] = {}
    for row in table.rows:
        rows.setdefault((f"times: {row.kind}", row.evidence), row.source)
    found = [(what, evidence, source) for (what, evidence), source in rows.items()]
    for name, text in sources.items():
        evidence, _, source = text.partition(": ")
        found.append((f"cluster.{name}", evidence, source))
    report = "V3 report §3.3" if recipe.precision is Precision.FP8 else "the configuration"
    found.append(
        (f"GEMMs in {recipe.precision.value}", "published" if recipe.precision is Precision.FP8 else "chosen", report)
    )
    recompute = "V3 report §3.2.3" if recipe.recompute is Recompute.REPORT else "the search"
    found.append(
        (f"recompute: {recipe.recompute.value}", "published" if "report" in recompute else "chosen", recompute)
    )
    lent = (
        "V3 report §3.2.2" if recipe.comm_sms == 20 else "DeepEP V2's README, measured with 32 ranks, not this layout"
    )
    found.append((f"{recipe.comm_sms} SMs lent", "published", lent))
    found += [
        ("routing uniform within the node limit", "assumed", "the router's balancing (V3 report §2.1.2)"),
        ("exchanges wait for other ranks beside another chunk only", "assumed", "the trace has no lone chunk"),
        ("messages between stages do not slow exchanges down", "assumed", "the trace leaves pipeline messages out"),
        ("computing is as fast beside an exchange as alone", "measured", "attn(W) of the trace, alone and beside one"),
        ("gradients are reduced after the last backward", "chosen", "the runtime does so"),
        ("exchange buffers 1 GB, CUDA context and libraries 2 GB", "assumed", "no measurement"),
        ("a machine without failures, jitter and expert skew", "assumed", "explicit inputs, all zero"),
    ]
    return found
