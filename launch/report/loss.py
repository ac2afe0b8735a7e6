"""Loss section of a report."""

from collections.abc import Iterator

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
        if event.kind == "resume":
            found.setdefault(event.step, []).append("resumed from a checkpoint")
        elif event.kind == "warning":
            found.setdefault(event.step, []).append(str(event.values.get("message")))
    return [(step, "; ".join(texts)) for step, texts in found.items()]


def _curves(record: RunRecord) -> Iterator[Block]:
    series = [
        Series("training", record.metric_points("loss"), "c1"),
        Series("multi-token prediction", record.metric_points("loss/mtp"), "c4"),
        Series("validation", record.metric_points("loss", "evaluation"), "c2"),
        Series("validation, EMA weights", record.metric_points("loss/averaged", "evaluation"), "c3"),
    ]
    floor = record.last_value("unigram_entropy", "evaluation")
    marks = step_annotations(record)
    plot = Plot(
        series,
        height=300,
        reference_lines=[] if floor is None else [("unigram entropy", floor)],
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
        ("Gradient norm", "grad_norm", "c1"),
        ("Learning rate", "learning_rate", "c3"),
        ("Tokens/s", "tokens_per_second", "c2"),
    )
    for title, key, style in shown:
        series = [Series(title.lower(), record.metric_points(key), style)]
        plot = Plot(series, width=300, height=150, y_axis_from_zero=True, has_legend=False)
        yield from plot.figures(title)


def _sample(record: RunRecord) -> Block:
    sample = record.last_event("sample")
    if sample is not None:
        text = strip_control_codes(str(sample.values.get("text"))).strip()
        return PreformattedText(f"Text sampled at step {sample.step:,}", text)
    asks_for_none = record.config_value("training.sample_tokens") == 0
    hint = "Set training.sample_tokens=100." if asks_for_none else "A text is sampled at the end of the run."
    return MissingDataNotice("No text was sampled.", hint)
