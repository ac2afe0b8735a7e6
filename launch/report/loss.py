"""Loss section of a report."""

from collections.abc import Iterator

from ...trainer.telemetry.events import LossEvaluated, RunResumed, TextSampled, WarningRaised
from ...trainer.telemetry.format import strip_control_codes
from ..answers.blocks import Block, Figure, FigureRow, MissingDataNotice, PreformattedText
from .plot import Plot, Series
from .run_record import RunRecord


def loss_section(record: RunRecord) -> Iterator[Block]:
    """Yield the loss curves, and the last sampled text."""
    yield from _curves(record)
    yield _sample(record)


def step_annotations(record: RunRecord) -> list[tuple[float, str]]:
    """Return (step, text) of resumes and warnings, after which curves may jump; one entry per step."""
    found: dict[int, list[str]] = {}
    for event in record.events:
        if isinstance(event, RunResumed):
            found.setdefault(event.step, []).append("resumed from a checkpoint")
        elif isinstance(event, WarningRaised):
            found.setdefault(event.step, []).append(event.message)
    return [(step, "; ".join(texts)) for step, texts in found.items()]


def _curves(record: RunRecord) -> Iterator[Block]:
    evaluations = record.events_of(LossEvaluated)
    averaged = [(event.step, event.averaged_loss) for event in evaluations if event.averaged_loss is not None]
    series = [
        Series("training", record.step_points(lambda step: step.loss), "c1"),
        Series("multi-token prediction", record.step_points(lambda step: step.mtp_loss), "c4"),
        Series("validation", [(event.step, event.loss) for event in evaluations], "c2"),
        Series("validation, EMA weights", averaged, "c3"),
    ]
    marks = step_annotations(record)
    plot = Plot(
        series,
        height=300,
        reference_lines=[("unigram entropy", event.unigram_entropy) for event in evaluations[-1:]],
        step_annotations=marks,
        format_value=lambda value: f"{value:.3f}",
    )
    note = "Dashed vertical lines: a resume or a warning." if marks else ""
    figures = list(plot.figures("Loss in nats/token, over optimizer steps", note))
    if not figures:
        why = "no step is logged yet" if not record.step_events else "no logged loss is finite"
        yield MissingDataNotice(f"No curves: {why}.", "A run logs its first step, and every telemetry.log_every steps.")
        return
    yield from figures
    yield FigureRow([*_small_plots(record)])


def _small_plots(record: RunRecord) -> Iterator[Figure]:
    """Yield plots of a third of the page's width."""
    shown = (
        ("Gradient norm", record.step_points(lambda step: step.grad_norm), "c1"),
        ("Learning rate", record.step_points(lambda step: step.learning_rate), "c3"),
        ("Tokens/s", record.step_points(lambda step: step.tokens_per_second), "c2"),
    )
    for title, points, style in shown:
        series = [Series(title.lower(), points, style)]
        plot = Plot(series, width=300, height=150, y_axis_from_zero=True, has_legend=False)
        yield from plot.figures(title)


def _sample(record: RunRecord) -> Block:
    sample = record.last_event(TextSampled)
    if sample is not None:
        return PreformattedText(f"Text sampled at step {sample.step:,}", strip_control_codes(sample.text).strip())
    asks_for_none = record.config_value("training.sample_tokens") == 0
    hint = "Set training.sample_tokens=100." if asks_for_none else "A text is sampled at the end of the run."
    return MissingDataNotice("No text was sampled.", hint)
