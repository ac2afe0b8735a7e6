"""Formatting of events as lines of plain text."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from ...comm.units import format_bytes, format_duration, format_si, format_significant
from .events import JSON, Event, numbers_in_list, parse_number


def describe_event(event: Event) -> str:
    """Return `event` as one line of plain text; for a sample its text follows, indented."""
    if event.kind in _SHORT:
        return _SHORT[event.kind](event)
    head = f"{event.kind} at step {event.step}"
    if event.kind == "sample":
        text = {key: value for key, value in event.values.items() if isinstance(value, str)}
        return "\n".join(
            [head, *(f"  | {line}" for value in text.values() for line in strip_control_codes(value).splitlines())]
        )
    return "  ".join([head, *format_values(event.values)])


def format_values(values: Mapping[str, JSON]) -> list[str]:
    """Return `name value` for each number, flag and string; lists, mappings and nulls are only in the file."""
    return [f"{key} {_short(value)}" for key, value in values.items() if isinstance(value, bool | int | float | str)]


def strip_control_codes(text: str) -> str:
    """Return `text` without control codes: generated text must not control the terminal."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "�" for letter in text)


def _step(event: Event) -> str:
    values = event.values
    total = values["total_steps"]
    words = [f"step {event.step:>{len(str(total))}}/{total}", f"loss {_number(values, 'loss'):.3f}"]
    if values.get("loss/mtp") is not None:
        words.append(f"mtp {_number(values, 'loss/mtp'):.3f}")
    words.append(f"lr {_number(values, 'learning_rate'):.1e}".replace("e-0", "e-").replace("e+00", "e0"))
    words.append(f"grad {_number(values, 'grad_norm'):.2f}")
    words.append(f"{format_si(_number(values, 'tokens_per_second'))} tok/s")
    if values.get("mfu") is not None:
        words.append(f"mfu {100 * _number(values, 'mfu'):.1f} %")
    words.append(f"{_number(values, 'gpu_hours'):.4f} GPU-h")
    words.append(f"{100 * _number(values, 'budget_share'):.1f} % of budget")
    words.append(f"ETA {format_duration(_number(values, 'eta_seconds'))}")
    return "  ".join(words)


def _run(event: Event) -> str:
    values = event.values
    active, total = (format_si(_number(values, key)) for key in ("active_parameters", "parameters"))
    linears = ", Linears in FP8" if values["linear"] == "fp8" else ""
    where = f"{values['ranks']} ranks on {values['device']}, computing in {values['compute_dtype']}{linears}"
    work = f"{values['total_steps']} steps, {format_si(_number(values, 'flops_per_token'))}FLOP per token"
    peak = f"peak {_number(values, 'peak_tflops'):.3g} TFLOPS per rank ({values['peak_source']})"
    lines = [f"{total} parameters, {active} active per token; {where}", f"{work}; {peak}"]
    if "attention" in values:  # missing in runs of earlier versions
        lines.append(f"attention by {values['attention']}")
    return "\n".join(lines)


def _budget(event: Event) -> str:
    values = event.values
    hours, percent = _number(values, "gpu_hours"), 100 * _number(values, "budget_share")
    share = f"{percent:.0f}" if percent >= 10 else f"{percent:.2g}"
    line = f"{format_significant(hours)} GPU-hours so far ({share} % of budget)"
    if values["gpu_hours_per_trillion_tokens"] is None:
        return line
    rate = float(str(values["gpu_hours_per_trillion_tokens"]))
    published = _number(values, "published_gpu_hours_per_trillion_tokens")
    reference = f"DeepSeek-V3 on H800: {published:,.0f} (not comparable on CPU)"
    return f"{line}. Rate: {rate:,.0f} GPU-hours per trillion tokens; {reference}"


def _evaluation(event: Event) -> str:
    values = event.values
    line = f"step {event.step}: validation loss {_number(values, 'loss'):.4f} nats per token"
    if "loss/averaged" in values:
        line += f", with averaged weights {_number(values, 'loss/averaged'):.4f},"
    floor = f"unigram entropy of the same text {_number(values, 'unigram_entropy'):.4f}"
    return f"{line} over {values['targets']:,} tokens ({floor})"


def _memory(event: Event) -> str:
    now, peak = (format_bytes(max(numbers_in_list(event.values[key]))) for key in ("now", "peak"))
    return f"step {event.step}: memory: {now} on the largest rank (peak {peak})"


def _stop(event: Event) -> str:
    reason = str(event.values["reason"])
    if reason == "done":
        return f"finished at step {event.step}"
    return f"ended at step {event.step}: {strip_control_codes(reason)}"


def _number(values: Mapping[str, JSON], key: str) -> float:
    number = parse_number(values[key])
    if number is None:
        raise TypeError(f"{key} must be a number, not {values[key]!r}")
    return number


def _short(value: bool | int | float | str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else strip_control_codes(value)


_SHORT: Mapping[str, Callable[[Event], str]] = MappingProxyType(
    {"run": _run, "step": _step, "evaluation": _evaluation, "budget": _budget, "memory": _memory, "stop": _stop}
)
"""Kinds with a special format; other kinds list their values."""
