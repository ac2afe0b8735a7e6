"""Which configuration a checkpoint can be gone on from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from ...comm.refusal import Problem
from ..config import RunConfig

_FIXED = (
    *("model", "topology", "precision", "optimizer.moments", "optimizer.ema_decay"),
    *("training.seed", "training.sequence_length", "training.global_batch"),
)
"""What shapes, places or positions in the data depend on. The rest may change when a run goes on: rates and weights of
the loss, the size of micro-batches, how often to look, how far to go."""


def incompatibilities(facts: Mapping[str, Any], config: RunConfig, data_digest: str | None = None) -> Iterator[Problem]:
    """What keeps `config`, on the data with this digest, from going on from the checkpoint with these `facts`."""
    now = asdict(config)
    for path in _FIXED:
        saved, wanted = facts["config"], now
        for key in path.split("."):
            saved, wanted = saved[key], wanted[key]
        yield from _differences(path, saved, wanted, facts["step"])
    if data_digest is not None and facts["data"] != data_digest:
        remedy = f"holds other tokens than the checkpoint of step {facts['step']} was trained on; restore them"
        yield Problem("data.prepared", config.data.prepared, f"{remedy}, or use another training.run_dir")


def _differences(path: str, saved: Any, wanted: Any, step: int) -> Iterator[Problem]:
    if isinstance(saved, Mapping) and isinstance(wanted, Mapping):
        for key in wanted:
            yield from _differences(f"{path}.{key}", saved.get(key), wanted[key], step)
    elif saved != wanted:
        remedy = f"the checkpoint of step {step} has {saved!r}; go on with that, or use another training.run_dir"
        yield Problem(path, wanted, remedy)
