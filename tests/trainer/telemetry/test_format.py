"""Events as readable lines: figures, facts, durations and rates."""

import pytest

from shoestring.tests.trainer.telemetry.written_events import EVALUATION, STEP
from shoestring.trainer.telemetry.events import JSON, Event
from shoestring.trainer.telemetry.format import describe_event


def test_a_step_is_one_line_with_its_figures() -> None:
    assert describe_event(Event("step", 40, STEP)) == (
        "step  40/400  loss 5.213  mtp 5.400  lr 2.0e-3  grad 0.81  6.1k tok/s  0.0123 GPU-h  1.2 % of budget  ETA 1:23"
    )


def test_figures_that_a_run_does_not_have_are_left_out_and_known_ones_shown() -> None:
    without_mtp = {key: value for key, value in STEP.items() if key != "loss/mtp"}
    line = describe_event(Event("step", 40, {**without_mtp, "mfu": 0.3894}))
    assert "mtp" not in line
    assert "  mfu 38.9 %  " in line


def test_a_loss_that_is_not_a_number_is_shown() -> None:
    assert "loss nan" in describe_event(Event("step", 40, {**STEP, "loss": float("nan")}))


COST: dict[str, JSON] = {"gpu_hours": 0.25, "budget_share": 0.5, "gpu_hours_per_trillion_tokens": 500000.0}
RUN: dict[str, JSON] = {
    "config": {"a": 1},
    "parameters": 3_477_728,
    "active_parameters": 1_708_256,
    "ranks": 4,
    "device": "cpu",
    "compute_dtype": "float32",
    "linear": "native",
    "total_steps": 391,
    "flops_per_token": 1.0851e7,
    "peak_tflops": 0.0442,
    "peak_source": "measured",
}


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (Event("checkpoint", 7, {"path": "runs/x", "kept": True}), "checkpoint at step 7  path runs/x  kept yes"),
        (Event("stop", 7, {"reason": "done"}), "finished at step 7"),
        (
            EVALUATION,
            "step 20: validation loss 5.2500 nats per token over 4,096 tokens "
            "(unigram entropy of the same text 5.8312)",
        ),
        (
            Event("budget", 7, {**COST, "published_gpu_hours_per_trillion_tokens": 180000}),
            "0.25 GPU-hours so far (50 % of budget). Rate: 500,000 GPU-hours per trillion tokens; "
            "DeepSeek-V3 on H800: 180,000 (not comparable on CPU)",
        ),
        (
            Event("run", 0, RUN),
            "3.5M parameters, 1.7M active per token; 4 ranks on cpu, computing in float32\n"
            "391 steps, 10.9MFLOP per token; peak 0.0442 TFLOPS per rank (measured)",
        ),
        (
            Event("run", 0, {**RUN, "attention": "cudnn (cuDNN's fused kernel): training.attention_backend=cudnn"}),
            "3.5M parameters, 1.7M active per token; 4 ranks on cpu, computing in float32\n"
            "391 steps, 10.9MFLOP per token; peak 0.0442 TFLOPS per rank (measured)\n"
            "attention by cudnn (cuDNN's fused kernel): training.attention_backend=cudnn",
        ),
        (
            Event("run", 0, {**RUN, "linear": "fp8"}),
            "3.5M parameters, 1.7M active per token; 4 ranks on cpu, computing in float32, Linears in FP8\n"
            "391 steps, 10.9MFLOP per token; peak 0.0442 TFLOPS per rank (measured)",
        ),
    ],
)
def test_other_events_name_their_facts(event: Event, line: str) -> None:
    assert describe_event(event) == line


def test_a_sample_cannot_steer_the_terminal() -> None:
    text = describe_event(Event("sample", 7, {"prompt": "To be", "text": "or \x1b[2Jnot\nto be"}))
    assert text == "sample at step 7\n  | To be\n  | or �[2Jnot\n  | to be"
