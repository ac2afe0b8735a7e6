"""Formatting of events as lines of plain text."""

from collections.abc import Mapping

from ...comm.units import format_bytes, format_duration, format_si, format_significant
from .events import (
    JSON,
    BudgetReported,
    Event,
    LossEvaluated,
    MemoryMeasured,
    RunStarted,
    RunStopped,
    StepLogged,
    TextSampled,
)


def describe_event(event: Event) -> str:
    """Return `event` as one line of plain text; for a sample its text follows, indented."""
    match event:
        case RunStarted():
            return _run(event)
        case StepLogged():
            return _step(event)
        case LossEvaluated():
            return _evaluation(event)
        case BudgetReported():
            return _budget(event)
        case MemoryMeasured():
            now, peak = format_bytes(max(event.now)), format_bytes(max(event.peak))
            return f"step {event.step}: memory: {now} on the largest rank (peak {peak})"
        case RunStopped(reason="done"):
            return f"finished at step {event.step}"
        case RunStopped():
            return f"ended at step {event.step}: {strip_control_codes(event.reason)}"
        case TextSampled():
            lines = strip_control_codes(event.text).splitlines()
            return "\n".join([f"sample at step {event.step}", *(f"  | {line}" for line in lines)])
        case _:
            return "  ".join([f"{event.kind} at step {event.step}", *format_values(event.values)])


def format_values(values: Mapping[str, JSON]) -> list[str]:
    """Return `name value` for each number, flag and string; lists, mappings and nulls are only in the file."""
    return [f"{key} {_short(value)}" for key, value in values.items() if isinstance(value, bool | int | float | str)]


def strip_control_codes(text: str) -> str:
    """Return `text` without control codes: generated text must not control the terminal."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "�" for letter in text)


def _step(event: StepLogged) -> str:
    total = event.total_steps
    words = [f"step {event.step:>{len(str(total))}}/{total}", f"loss {event.loss:.3f}"]
    if event.mtp_loss is not None:
        words.append(f"mtp {event.mtp_loss:.3f}")
    words.append(f"lr {event.learning_rate:.1e}".replace("e-0", "e-").replace("e+00", "e0"))
    words.append(f"grad {event.grad_norm:.2f}")
    words.append(f"{format_si(event.tokens_per_second)} tok/s")
    words.append(f"mfu {100 * event.mfu:.1f} %")
    words.append(f"{event.gpu_hours:.4f} GPU-h")
    words.append(f"{100 * event.budget_share:.1f} % of budget")
    words.append(f"ETA {format_duration(event.eta_seconds)}")
    return "  ".join(words)


def _run(event: RunStarted) -> str:
    linears = ", Linears in FP8" if event.linear == "fp8" else ""
    where = f"{event.ranks} ranks on {event.device}, computing in {event.compute_dtype}{linears}"
    size = f"{format_si(event.parameters)} parameters, {format_si(event.active_parameters)} active per token"
    work = f"{event.total_steps} steps, {format_si(event.flops_per_token)}FLOP per token"
    peak = f"peak {event.peak_tflops:.3g} TFLOPS per rank ({event.peak_source})"
    return f"{size}; {where}\n{work}; {peak}\nattention by {event.attention}"


def _budget(event: BudgetReported) -> str:
    percent, rate = 100 * event.budget_share, event.gpu_hours_per_trillion_tokens
    share = f"{percent:.0f}" if percent >= 10 else f"{percent:.2g}"
    line = f"{format_significant(event.gpu_hours)} GPU-hours so far ({share} % of budget)"
    if rate is None:
        return line
    published = event.published_gpu_hours_per_trillion_tokens
    reference = f"DeepSeek-V3 on H800: {published:,.0f} (not comparable on CPU)"
    return f"{line}. Rate: {rate:,.0f} GPU-hours per trillion tokens; {reference}"


def _evaluation(event: LossEvaluated) -> str:
    line = f"step {event.step}: validation loss {event.loss:.4f} nats per token"
    if event.averaged_loss is not None:
        line += f", with averaged weights {event.averaged_loss:.4f},"
    floor = f"unigram entropy of the same text {event.unigram_entropy:.4f}"
    return f"{line} over {event.targets:,} tokens ({floor})"


def _short(value: bool | int | float | str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else strip_control_codes(value)
