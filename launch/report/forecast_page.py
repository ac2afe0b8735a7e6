"""Forecast as one self-contained HTML page: figures, timeline of all ranks, memory per rank."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from ...comm.units import format_giga
from ...trainer.ledger.terms import to_label
from ...trainer.memory.peak import MEMORY_LABELS
from ..planner.forecast import StepForecast
from .schedule_svg import svg_timeline

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#22272e}"
    "table{border-collapse:collapse}td,th{padding:.2em .9em .2em 0;text-align:left;border-bottom:1px solid #d5d9de}"
    "td.n{text-align:right}.wide{overflow-x:auto}"
)
_COLORS = {
    "weights": "#4a78b5",
    "gradients": "#2f8f83",
    "optimizer_states": "#a38cc6",
    "activations": "#f0a830",
    "delayed_wgrad": "#d9744f",
    "p2p_messages": "#b55a8c",
    "exchange_buffers": "#6f7f3f",
    "workspace": "#8d99a6",
    "outside_allocator": "#c9ced4",
}


def forecast_html(forecast: StepForecast, title: str, memory_gb: float) -> str:
    """Return the page; `memory_gb` is the capacity of one GPU."""
    figures = {
        "step": f"{forecast.step_seconds:.3f} s",
        "throughput": f"{forecast.tokens_per_second_per_gpu:,.0f} tokens/s/GPU",
        "MFU (causal, without MTP)": f"{forecast.mfu:.2%}",
        "peak memory": f"{format_giga(forecast.peak_memory.total, 1)} GB, "
        f"{format_giga(forecast.peak_bytes_with_fragmentation, 1)} with fragmentation, of {memory_gb:g}",
        "bottleneck": forecast.bottleneck,
    }
    rows = "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in figures.items())
    view = "".join(
        f"<tr><td>{escape(to_label(k))}</td><td class=n>{v:.3f}</td></tr>"
        for k, v in forecast.deepseek_report_terms().items()
    )
    return (
        f"<!doctype html><meta charset=utf-8><title>{escape(title)}</title><style>{_STYLE}</style>"
        f"<h1>{escape(title)}</h1><table>{rows}</table>"
        f"<h2>Where a step goes (seconds, mean over ranks)</h2><table>{view}</table>"
        f"<h2>Timeline</h2><div class=wide>{svg_timeline(forecast.program_times, 'seconds')}</div>"
        f"<h2>Memory per pipeline rank</h2>{''.join(_memory_plot(forecast, memory_gb))}"
    )


def _memory_plot(forecast: StepForecast, memory_gb: float) -> Iterator[str]:
    width, height, step = 900, 22, 28
    most = max(memory_gb, max(memory.total for memory in forecast.memory_by_rank) / 1e9) * 1.05
    total = step * len(forecast.memory_by_rank) + 50
    yield f'<svg viewBox="0 0 {width + 160} {total}" width="100%" font-size="13" font-family="system-ui,sans-serif">'
    for rank, memory in enumerate(forecast.memory_by_rank):
        x, y = 60.0, 10 + rank * step
        yield f'<text x="0" y="{y + 16}">rank {rank}</text>'
        for part, color in _COLORS.items():
            size = memory.__dict__[part] / 1e9 / most * width
            label = f"{MEMORY_LABELS[part]}: {format_giga(memory.__dict__[part], 1)} GB"
            box = f'x="{x:.1f}" y="{y}" width="{size:.1f}" height="{height}"'
            yield f'<rect {box} fill="{color}"><title>{label}</title></rect>'
            x += size
        yield f'<text x="{x + 6:.1f}" y="{y + 16}">{format_giga(memory.total, 1)} GB</text>'
    limit = 60 + memory_gb / most * width
    yield f'<line x1="{limit:.1f}" x2="{limit:.1f}" y1="4" y2="{total - 40}" stroke="#b3261e" stroke-dasharray="4 3"/>'
    x = 60
    for part, color in _COLORS.items():
        yield f'<rect x="{x}" y="{total - 24}" width="12" height="12" fill="{color}"/>'
        yield f'<text x="{x + 17}" y="{total - 13}">{MEMORY_LABELS[part]}</text>'
        x += 115
    yield "</svg>"
