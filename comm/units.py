"""Numbers with units, as text and from text, and whole numbers rounded up."""

import math
import string
from collections.abc import Mapping

from .errors import ConfigError, Problem

_BYTES = {"KB": 1e3, "MB": 1e6, "GB": 1e9}
_COUNTS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}


def ceil_div(numerator: int, denominator: int) -> int:
    """Return `numerator / denominator`, rounded up."""
    return -(-numerator // denominator)


def round_up(size: int, step: int) -> int:
    """Return the smallest multiple of `step` that is at least `size`."""
    return ceil_div(size, step) * step


def format_giga(value: float, decimals: int = 2) -> str:
    """Return `value` in billions, for bytes in GB and the like, without a unit."""
    return f"{value / 1e9:,.{decimals}f}"


def format_mega(value: float, decimals: int = 2) -> str:
    """Return `value` in millions, for bytes in MB and the like, without a unit."""
    return f"{value / 1e6:,.{decimals}f}"


def format_bytes(size: float) -> str:
    """Return a size in GB, or in MB below one GB, with four digits."""
    return f"{size / 1e9:.4g} GB" if size >= 1e9 else f"{size / 1e6:.4g} MB"


def format_count(count: float, digits: str = ".4g") -> str:
    """Return a count in trillions, billions or millions, formatted by `digits`: 14.8 T. A smaller one is in full."""
    for letter in "TBM":
        if count >= _COUNTS[letter]:
            return f"{count / _COUNTS[letter]:{digits}} {letter}"
    return f"{count:,.0f}"


def format_si(value: float) -> str:
    """Return `value` with one decimal and an SI prefix: 6104 is 6.1k."""
    for scale, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.1f}{letter}"
    return f"{value:.0f}"


def format_number(value: float) -> str:
    """Return `value` with four digits, or with an SI prefix from ten thousand on."""
    return format_si(value) if abs(value) >= 10_000 else f"{value:.4g}"


def format_significant(value: float) -> str:
    """Return `value` with three significant digits, or as an integer from 100 on."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def format_percent(share: float) -> str:
    """Return a share of 1 in percent, with two or three significant digits if it is small."""
    return f"{100 * share:.1f} %" if share == 0 or share >= 0.001 else f"{100 * share:.2g} %"


def format_duration(seconds: float) -> str:
    """Return `seconds` as m:ss or h:mm:ss or, beyond a day, as d days h:mm:ss."""
    if not seconds < math.inf:
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def format_gpu_hours(hours: float) -> str:
    """Return GPU-hours with digits that fit their size; the fourth decimal is a third of a GPU-second."""
    return f"{hours:,.0f}" if abs(hours) >= 10_000 else f"{hours:,.2f}" if abs(hours) >= 100 else f"{hours:.4f}"


def format_usd(gpu_hours: float, usd_per_gpu_hour: float) -> str:
    """Return the cost of GPU-hours in USD."""
    cost = gpu_hours * usd_per_gpu_hour
    shown = f"{cost:,.0f}" if cost >= 10_000 else f"{cost:,.2f}" if cost >= 1 else f"{cost:.4f}"
    return f"${shown} at ${usd_per_gpu_hour:g} per GPU-hour"


def parse_token_count(text: str, option: str) -> float:
    """Return the number of tokens of 14.8T, 300B or 2e6. Raises `ConfigError` that names `option`."""
    return _parse_positive(text, _COUNTS, option, "must be a number of tokens such as 14.8T, 300B or 2e6")


def parse_byte_size(text: str, option: str) -> int:
    """Return the bytes of `5GB`, `500MB` or `64KB`. Raises `ConfigError` that names `option`."""
    return round(_parse_positive(text, _BYTES, option, "must be a size such as 5GB, 500MB or 64KB"))


def _parse_positive(text: str, units: Mapping[str, float], option: str, hint: str) -> float:
    digits = text.rstrip(string.ascii_letters)
    unit = units.get(text[len(digits) :].upper())
    try:
        number = float(digits)
    except ValueError:
        number = math.nan
    if unit is None or not 0 < number * unit < math.inf:
        raise ConfigError([Problem(option, text, hint)])
    return number * unit
