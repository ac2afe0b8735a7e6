"""Pretrain a frontier mixture-of-experts model inside a GPU-hour budget."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from .launch.verbs.plan import Plan
    from .trainer.generation.load import LoadedModel

__version__ = "0.2.0"
__all__ = ["__version__", "load", "metrics", "plan"]

# The functions import what they need when they are called: importing the package loads neither torch nor Hydra.


def load(
    directory: str | PathLike[str],
    *,
    step: int | None = None,
    ema_weights: bool = False,
    device: "torch.device | None" = None,
    dtype: "torch.dtype | None" = None,
) -> "LoadedModel":
    """Load the model of a run, a checkpoint or imported weights as an `nn.Module`; see `load_model` for the options.

    Raises `ConfigError`.
    """
    from .trainer.generation.load import load_model

    return load_model(Path(directory), step=step, ema_weights=ema_weights, device=device, dtype=dtype)


def metrics(run: str | PathLike[str], kind: str = "step") -> dict[str, list[Any]]:
    """Return events of one kind (see `EVENT_KINDS`) of a run's `metrics.jsonl` as columns; None for a missing value.

    `kind` is mostly `step` or `evaluation`. Steps that a resume has undone are absent. Raises `ConfigError`.
    """
    from .trainer.telemetry.history import metrics_table

    return metrics_table(Path(run), kind)


def plan(overrides: Sequence[str], config_dir: Path | None = None, keep: int = 5) -> "Plan":
    """Search the `keep` best layouts of the run that `overrides` describe, as `shoestring plan` does.

    Raises `ConfigError`.
    """
    from .launch.verbs.plan import plan as search

    return search(overrides, config_dir, keep)
