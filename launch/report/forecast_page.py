"""Forecast as one self-contained HTML page: figures, timeline of all ranks, memory per rank."""

from __future__ import annotations

from collections.abc import Iterator

from markupsafe import Markup

from ...trainer.ledger.terms import to_label
from ...trainer.memory.peak import MEMORY_LABELS
from ..answers.blocks import Answer, Figure, HeadlineCard, LegendEntry, PageSection, Quantity, table
from ..answers.page import html_page
from ..planner.forecast import StepForecast
from . import svg
from .timeline import svg_timeline

_COLORS = {
    "weights": "i",
    "gradients": "b",
    "optimizer_states": "w",
    "activations": "f",
    "delayed_wgrad": "k7",
    "p2p_messages": "k1",
    "exchange_buffers": "k2",
    "workspace": "k9",
    "outside_allocator": "k6",
}
_LEFT, _WIDTH, _RIGHT, _ROW = 60.0, 760.0, 80.0, 28.0


def forecast_html(forecast: StepForecast, title: str, memory_gb: float) -> str:
    """Return the page; `memory_gb` is the capacity of one GPU."""
    answer = Answer(
        title=title,
        data=None,
        state="forecast",
        state_style="busy",
        header_lines=[f"bottleneck: {forecast.bottleneck}"],
        cards=forecast_cards(forecast, memory_gb),
        sections=forecast_sections(forecast, memory_gb),
    )
    return html_page(answer, "shoestring simulate")


def forecast_cards(forecast: StepForecast, memory_gb: float) -> list[HeadlineCard]:
    """Return the forecast's main figures."""
    fragmented = f"{forecast.peak_bytes_with_fragmentation / 1e9:.1f}"
    return [
        HeadlineCard("step", f"{forecast.step_seconds:.3f} s"),
        HeadlineCard("throughput", f"{forecast.tokens_per_second_per_gpu:,.0f}", "tokens/s/GPU"),
        HeadlineCard("MFU", f"{forecast.mfu:.2%}", note="causal, without MTP"),
        HeadlineCard("GPUs", f"{forecast.gpus:,}"),
        HeadlineCard("peak memory", f"{forecast.peak_memory.total / 1e9:.1f}", "GB"),
        HeadlineCard("with fragmentation", fragmented, "GB", f"of {memory_gb:g} GB"),
    ]


def forecast_sections(forecast: StepForecast, memory_gb: float) -> list[PageSection]:
    """Return the sections: where a step goes, timeline of all ranks, memory per rank."""
    terms = [
        (to_label(name), Quantity(seconds, f"{seconds:.3f}"))
        for name, seconds in forecast.deepseek_report_terms().items()
    ]
    timeline = Figure("", svg_timeline(forecast.program_times, unit="seconds"), is_wide=True)
    legend = [LegendEntry(MEMORY_LABELS[part], color) for part, color in _COLORS.items()]
    note = f"Dashed line: {memory_gb:g} GB of one GPU."
    memory = Figure("GB at the peak, by pipeline rank", _memory_bars(forecast, memory_gb), legend, note, is_wide=True)
    return [
        PageSection("step", "Where a step goes", [table("", ("term", "seconds, mean over ranks"), terms)]),
        PageSection("timeline", "Timeline", [timeline]),
        PageSection("memory", "Memory", [memory]),
    ]


def _memory_bars(forecast: StepForecast, memory_gb: float) -> Markup:
    capacity = 1e9 * memory_gb
    scale = _WIDTH / max(capacity, *(memory.total for memory in forecast.memory_by_rank))
    height = _ROW * len(forecast.memory_by_rank)
    limit = _LEFT + capacity * scale

    def rows() -> Iterator[Markup]:
        for rank, memory in enumerate(forecast.memory_by_rank):
            x, y = _LEFT, _ROW * rank
            yield svg.text(0, y + 19, f"rank {rank}")
            for part, color in _COLORS.items():
                bytes_of_part = vars(memory)[part]
                title = f"{MEMORY_LABELS[part]}: {bytes_of_part / 1e9:.1f} GB"
                yield svg.group(title, [svg.rect(x, y + 3, bytes_of_part * scale, 22, color)])
                x += bytes_of_part * scale
            yield svg.text(_LEFT + _WIDTH + 12, y + 19, f"{memory.total / 1e9:.1f} GB")
        yield svg.line(limit, 0, limit, height, "bad", stroke_dasharray="4 3")

    width = "display:block;width:100%;min-width:600px"
    return svg.page_picture(_LEFT + _WIDTH + _RIGHT, height, rows(), "memory by pipeline rank", style=width)
