"""Events of a run, and a run directory that they are written to."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from shoestring import __version__
from shoestring.trainer.telemetry.events import Event, LossEvaluated, RunStarted, StepLogged
from shoestring.trainer.telemetry.stream import EventStream

RUN = RunStarted(
    step=0,
    version=__version__,
    config={"model": {"layers": 4}},
    ranks=4,
    device="cpu",
    compute_dtype="float32",
    linear="native",
    attention="blocks",
    parameters=3_477_728,
    active_parameters=1_708_256,
    total_steps=391,
    flops_per_token=1.0851e7,
    mfu_convention="MTP included",
    peak_tflops=0.0442,
    peak_source="measured",
)
STEP = StepLogged(
    step=40,
    loss=5.2131,
    mtp_loss=5.4,
    balance_loss=1e-4,
    total_loss=6.8,
    learning_rate=2.0e-3,
    mtp_loss_scaling_factor=0.3,
    router_bias_update_rate=1e-3,
    grad_norm=0.812,
    metrics={"tokens_per_expert/layer_01": [3, 5]},
    tokens=81920,
    tokens_per_second=6104.0,
    tflops=0.0172,
    mfu=0.3894,
    gpu_hours=0.0123,
    budget_share=0.012,
    budget_left=0.9877,
    projected_gpu_hours=None,
    goodput=0.5,
    eta_seconds=83.2,
    total_steps=400,
)
EVALUATION = LossEvaluated(step=20, loss=5.25, targets=4096, unigram_entropy=5.8312)


def write(run_dir: Path, *events: Event) -> Path:
    stream = EventStream(run_dir, [])
    for event in events:
        stream.emit(event)
    stream.close()
    return run_dir / "metrics.jsonl"


def run(number: int = 0) -> RunStarted:
    return replace(RUN, step=number)


def step(number: int, loss: float = 3.0, **changes: Any) -> StepLogged:
    return replace(STEP, step=number, loss=loss, **changes)


RUN_OF_FORMAT_1 = (
    '{"time": 1790000000.0, "kind": "run", "step": 0, "config": {"model": {"layers": 4}}, "ranks": 4, "device": "cpu", '
    '"compute_dtype": "float32", "linear": "native", "attention": "blocks", "parameters": 12, "active_parameters": 8, '
    '"total_steps": 400, "flops_per_token": 72.0, "mfu_convention": "MTP included", "peak_tflops": 0.1, '
    '"peak_source": "cluster.peak_tflops"}\n'
)
"""First line of `metrics.jsonl` as version 0.1.0 wrote it, before metrics had a format number."""
