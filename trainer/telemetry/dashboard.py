"""Dashboard of a run as a list of panels of metrics, named as in `step` events."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Panel:
    """Plot of metrics against training steps."""

    title: str
    metrics: Sequence[str]
    is_single_value: bool = False
    """True to show only the last value."""


@dataclass(frozen=True)
class PanelSection:
    """Panels under one heading."""

    name: str
    panels: Sequence[Panel]


def make_dashboard(routers: Sequence[str]) -> list[PanelSection]:
    """Return the dashboard of a model whose MoE layers are named `routers`."""
    return [
        PanelSection(
            "Budget",
            (
                Panel("GPU-hours left", ["budget_left"]),
                Panel("GPU-hours: spent, and projected at the end", ["gpu_hours", "projected_gpu_hours"]),
                Panel("Goodput", ["goodput"]),
                Panel(
                    "GPU-hours per trillion retained tokens",
                    ["budget/gpu_hours_per_trillion_tokens"],
                    is_single_value=True,
                ),
            ),
        ),
        PanelSection(
            "Loss",
            (
                Panel("Training loss", ["loss", "loss/mtp"]),
                Panel("Validation loss", ["evaluation/loss"]),
                Panel("Balance loss", ["loss/seq_aux"]),
                Panel("Gradient norm", ["grad_norm"]),
                Panel("Learning rate", ["learning_rate"]),
            ),
        ),
        PanelSection(
            "Throughput",
            (
                Panel("Tokens/s", ["tokens_per_second"]),
                Panel("Model FLOPs utilization", ["mfu"]),
                Panel("TFLOPS per rank", ["tflops"]),
            ),
        ),
        PanelSection(
            "Balance",
            (
                Panel("Load imbalance (max load ÷ mean − 1): experts, ranks, nodes", [*_violations("")]),
                Panel("Routing bias, lowest and highest", ["bias/min", "bias/max"]),
                *(Panel(f"Load imbalance, {router}", [*_violations(f"{router}/")]) for router in routers),
            ),
        ),
        PanelSection(
            "Expert load: experts against steps", [Panel(router, [f"tokens_per_expert/{router}"]) for router in routers]
        ),
    ]


def _violations(router: str) -> list[str]:
    return [f"{load}/{router}max_violation" for load in ("load", "load/ranks", "load/nodes")]
