"""Events as readable lines: figures, facts, durations and rates."""

from dataclasses import replace

import pytest

from shoestring.tests.trainer.telemetry.written_events import EVALUATION, RUN, STEP
from shoestring.trainer.telemetry.events import BudgetReported, CheckpointSaved, Event, RunStopped, TextSampled
from shoestring.trainer.telemetry.format import describe_event


def test_a_step_is_one_line_with_its_figures() -> None:
    assert describe_event(STEP) == (
        "step  40/400  loss 5.213  mtp 5.400  lr 2.0e-3  grad 0.81  6.1k tok/s  mfu 38.9 %  "
        "0.0123 GPU-h  1.2 % of budget  ETA 1:23"
    )


def test_a_figure_that_a_run_does_not_have_is_left_out() -> None:
    assert "mtp" not in describe_event(replace(STEP, mtp_loss=None))


def test_a_loss_that_is_not_a_number_is_shown() -> None:
    assert "loss nan" in describe_event(replace(STEP, loss=float("nan")))


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (CheckpointSaved(step=7, path="runs/x"), "checkpoint at step 7  path runs/x"),
        (RunStopped(step=7, reason="done"), "finished at step 7"),
        (
            EVALUATION,
            "step 20: validation loss 5.2500 nats per token over 4,096 tokens "
            "(unigram entropy of the same text 5.8312)",
        ),
        (
            BudgetReported(
                step=7,
                metrics={},
                gpu_hours=0.25,
                gpu_hours_per_trillion_tokens=500000.0,
                published_gpu_hours_per_trillion_tokens=180000,
                budget_share=0.5,
            ),
            "0.25 GPU-hours so far (50 % of budget). Rate: 500,000 GPU-hours per trillion tokens; "
            "DeepSeek-V3 on H800: 180,000 (not comparable on CPU)",
        ),
        (
            replace(RUN, attention="cudnn (cuDNN's fused kernel): training.attention_backend=cudnn"),
            "3.5M parameters, 1.7M active per token; 4 ranks on cpu, computing in float32\n"
            "391 steps, 10.9MFLOP per token; peak 0.0442 TFLOPS per rank (measured)\n"
            "attention by cudnn (cuDNN's fused kernel): training.attention_backend=cudnn",
        ),
        (
            replace(RUN, linear="fp8"),
            "3.5M parameters, 1.7M active per token; 4 ranks on cpu, computing in float32, Linears in FP8\n"
            "391 steps, 10.9MFLOP per token; peak 0.0442 TFLOPS per rank (measured)\n"
            "attention by blocks",
        ),
    ],
)
def test_other_events_name_their_facts(event: Event, line: str) -> None:
    assert describe_event(event) == line


def test_a_sample_cannot_steer_the_terminal() -> None:
    text = describe_event(TextSampled(step=7, text="To be\nor \x1b[2Jnot\nto be"))
    assert text == "sample at step 7\n  | To be\n  | or �[2Jnot\n  | to be"
