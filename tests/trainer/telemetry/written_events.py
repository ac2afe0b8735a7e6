"""Events of a run, and a run directory that they are written to."""

from pathlib import Path

from shoestring.trainer.telemetry.events import JSON, METRICS_FORMAT, Event, EventStream


def write(run_dir: Path, *events: Event) -> None:
    stream = EventStream(run_dir, [])
    for event in events:
        stream.emit(event)
    stream.close()


def run(number: int = 0) -> Event:
    return Event("run", number, {"format": METRICS_FORMAT})


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

RUN_OF_FORMAT_1 = (
    '{"time": 1790000000.0, "kind": "run", "step": 0, "config": {"model": {"layers": 4}}, "ranks": 4, "device": "cpu", '
    '"compute_dtype": "float32", "linear": "native", "attention": "blocks", "parameters": 12, "active_parameters": 8, '
    '"total_steps": 400, "flops_per_token": 72.0, "mfu_convention": "MTP included", "peak_tflops": 0.1, '
    '"peak_source": "cluster.peak_tflops"}\n'
)
"""First line of `metrics.jsonl` as version 0.1.0 wrote it, before metrics had a format number."""
