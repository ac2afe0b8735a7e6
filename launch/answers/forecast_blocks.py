"""Blocks that the answers of `simulate` and `plan` share: timeline, memory per pipeline rank, cost of the whole run."""

import argparse
from collections.abc import Iterator, Mapping, Sequence

from markupsafe import Markup

from ...comm.units import format_significant
from ...trainer.memory.peak import RankMemory, memory_label
from ..planner.forecast import StepForecast
from ..planner.layout_memory import memory_by_kind
from ..planner.run_cost import RunPhaseCost
from ..report import svg
from ..report.timeline import svg_timeline
from .blocks import Block, Cell, Figure, LegendEntry, Quantity, TableRow, number, table

_STYLES = {
    "weights": "k1",
    "gradients": "k3",
    "optimizer_states": "k5",
    "activations": "k2",
    "delayed_wgrad": "k4",
    "p2p_messages": "k7",
    "exchange_buffers": "k9",
    "workspace": "k8",
    "outside_allocator": "k6",
}
"""Style class of each kind of memory in the page's style sheet."""
_BAR_LEFT, _BAR_WIDTH, _BAR_HEIGHT, _BAR_STEP = 60, 760, 20, 26


def forecast_figures(forecast: StepForecast, memory_gb: float | None) -> Iterator[Figure]:
    """Yield the timeline of all pipeline ranks and their memory; `memory_gb` is the capacity of one GPU."""
    yield Figure("Timeline", lambda: svg_timeline(forecast.program_times, unit="seconds"), is_wide=True)
    yield Figure(
        "Memory per pipeline rank",
        lambda: _memory_bars(forecast.memory_by_rank, memory_gb),
        [LegendEntry(memory_label(part), style) for part, style in _STYLES.items()],
        "" if memory_gb is None else f"Dashed: the {memory_gb:g} GB of one GPU. Without fragmentation.",
        is_wide=True,
    )


def _memory_bars(memory_by_rank: Sequence[RankMemory], memory_gb: float | None) -> Markup:
    scale = _BAR_WIDTH / 1.05 / max(1e9 * (memory_gb or 0.0), *(memory.total for memory in memory_by_rank))
    height = _BAR_STEP * len(memory_by_rank) + 8

    def marks() -> Iterator[Markup]:
        for rank, memory in enumerate(memory_by_rank):
            x, y = float(_BAR_LEFT), 4 + rank * _BAR_STEP
            yield svg.text(0, y + 15, f"rank {rank}", "soft")
            for part, size in memory_by_kind(memory).items():
                box = svg.rect(x, y, size * scale, _BAR_HEIGHT, _STYLES[part])
                yield svg.group(f"{memory_label(part)}: {size / 1e9:.1f} GB", [box])
                x += size * scale
            yield svg.text(_BAR_LEFT + _BAR_WIDTH + 8, y + 15, f"{memory.total / 1e9:.1f} GB", "soft")
        if memory_gb is not None:
            limit = _BAR_LEFT + 1e9 * memory_gb * scale
            yield svg.line(limit, 0, limit, height, "bad", stroke_dasharray="4 3")

    width = _BAR_LEFT + _BAR_WIDTH + 80
    style = f"display:block;width:{width}px"
    return svg.page_picture(width, height, marks(), "memory by pipeline rank", font_size=13, style=style)


def phase_cost_blocks(phases: Sequence[RunPhaseCost], price: float | None) -> Iterator[Block]:
    """Yield the table of phases in GPU-hours, and USD if there is a price; notes on phases follow it."""
    total = RunPhaseCost("total", sum(phase.gpu_hours for phase in phases), "")
    rows = [TableRow(_phase_cells(phase, price), is_total=phase is total) for phase in (*phases, total)]
    yield table("The whole run", ("phase", "GPU-hours", "USD", "evidence"), rows)
    yield table("", (), [(phase.name, phase.note.replace("; ", "\n")) for phase in phases if phase.note])


def _phase_cells(phase: RunPhaseCost, price: float | None) -> list[Cell]:
    dollars: Cell = "-" if price is None else significant(phase.gpu_hours * price)
    return [phase.name, significant(phase.gpu_hours), dollars, phase.evidence]


def phase_cost_data(phases: Sequence[RunPhaseCost], price: float | None) -> Mapping[str, object]:
    """Return the cost of the phases by the keys of the JSON of `simulate` and `plan`; USD are None without a price."""

    def usd(hours: float) -> float | None:
        return None if price is None else hours * price

    hours = sum(phase.gpu_hours for phase in phases)
    return {
        "phase_costs": [vars(phase) | {"usd": usd(phase.gpu_hours)} for phase in phases],
        "total_gpu_hours": hours,
        "total_usd": usd(hours),
    }


def significant(value: float) -> Quantity:
    """Return a number with the digits of `format_significant`."""
    return Quantity(value, format_significant(value))


def relative(value: float, reference: float) -> Quantity:
    """Return the difference of `value` from `reference`, relative to it."""
    return number(value / reference - 1, "+.1%")


_INPUTS = {
    "comm_sms": (int, "N", "SMs reserved for communication (default: as measured)"),
    "skew": (float, "X", "expert load of the most loaded rank over the mean, minus 1 (default 0)"),
    "jitter": (float, "X", "standard deviation of node speed, as a fraction (default 0)"),
    "fragmentation": (float, "X", "memory lost to fragmentation, as a fraction of what a step allocates (default 0.1)"),
}


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for forecast inputs that no configuration has."""
    for name, (kind, metavar, text) in _INPUTS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)


def given_inputs(options: argparse.Namespace) -> dict[str, object]:
    """Return the inputs that were given, by recipe field."""
    return {name: value for name in _INPUTS if (value := getattr(options, name)) is not None}
