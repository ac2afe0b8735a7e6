"""Events of a run, and a run directory that they are written to."""

from __future__ import annotations

from pathlib import Path

from shoestring.trainer.telemetry.events import JSON, Event, EventStream


def write(run_dir: Path, *events: Event) -> None:
    stream = EventStream(run_dir, [])
    for event in events:
        stream.emit(event)
    stream.close()


def step(number: int, loss: float) -> Event:
    return Event("step", number, {"loss": loss})


STEP: dict[str, JSON] = {
    "loss": 5.2131,
    "loss/mtp": 5.4,
    "learning_rate": 2.0e-3,
    "grad_norm": 0.812,
    "tokens": 81920,
    "tokens_per_second": 6104.0,
    "mfu": None,
    "gpu_hours": 0.0123,
    "budget_share": 0.012,
    "eta_seconds": 83.2,
    "total_steps": 400,
    "tokens_per_expert/layer_01": [3, 5],
}
EVALUATION = Event("evaluation", 20, {"loss": 5.25, "targets": 4096, "unigram_entropy": 5.8312})
