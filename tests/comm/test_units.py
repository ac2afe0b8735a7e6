"""Numbers with units: as text, from text, and rounded up."""

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.comm.units import (
    ceil_div,
    format_bytes,
    format_count,
    format_duration,
    format_giga,
    format_gpu_hours,
    format_mega,
    format_number,
    format_percent,
    format_si,
    format_significant,
    format_usd,
    parse_byte_size,
    parse_token_count,
    round_up,
)


def test_whole_numbers_are_rounded_up() -> None:
    assert [ceil_div(number, 4) for number in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert [round_up(number, 4) for number in (0, 1, 4, 5)] == [0, 4, 4, 8]


def test_sizes_and_counts_have_their_unit() -> None:
    assert [format_bytes(size) for size in (1.25e6, 345.25e6, 79.85e9)] == ["1.25 MB", "345.2 MB", "79.85 GB"]
    assert [format_giga(1.2345e12), format_giga(5e8, 1), format_mega(1.5e6)] == ["1,234.50", "0.5", "1.50"]
    assert [format_count(count) for count in (14.8e12, 671e9, 2.5e6, 12_345)] == ["14.8 T", "671 B", "2.5 M", "12,345"]
    assert format_count(671_026_404_352, ".2f") == "671.03 B"


def test_durations_and_rates_read_well() -> None:
    durations = [format_duration(seconds) for seconds in (5, 83.2, 3661, 90061, float("inf"))]
    assert durations == ["0:05", "1:23", "1:01:01", "1 d 1:01:01", "?"]
    assert [format_si(rate) for rate in (12.0, 6104.0, 2.5e6, 3e9)] == ["12", "6.1k", "2.5M", "3.0G"]
    assert [format_number(value) for value in (0.12345, 9999.0, 12_345.0)] == ["0.1235", "9999", "12.3k"]


def test_costs_and_shares_have_digits_that_fit_their_size() -> None:
    assert [format_gpu_hours(value) for value in (0.01234, 123.456, 2664000)] == ["0.0123", "123.46", "2,664,000"]
    assert [format_percent(share) for share in (0, 0.0834, 1.5e-8)] == ["0.0 %", "8.3 %", "1.5e-06 %"]
    assert [format_usd(hours, 2) for hours in (0.01, 12, 2e6)] == [
        f"${cost} at $2 per GPU-hour" for cost in ("0.0200", "24.00", "4,000,000")
    ]


@pytest.mark.parametrize(
    ("number", "text"), [(0.1616, "0.162"), (0.0, "0"), (12.345, "12.3"), (100.4, "100"), (2_393_815.2, "2,393,815")]
)
def test_numbers_say_something_whatever_their_size(number: float, text: str) -> None:
    assert format_significant(number) == text


def test_numbers_are_read_with_their_unit() -> None:
    counts = [parse_token_count(text, "--tokens") for text in ("14.8T", "300b", "2e6", "12")]
    assert counts == [14.8e12, 3e11, 2e6, 12]
    assert [parse_byte_size(text, "--max-shard") for text in ("5GB", "1.5mb", "64KB")] == [5 * 10**9, 1_500_000, 64_000]


@pytest.mark.parametrize("text", ["", "T", "nan", "inf", "-1T", "0", "1e999", "1e308T", "12X", "5 G B", "1.2.3M"])
def test_a_text_that_is_no_positive_number_with_a_unit_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--tokens = .*must be a number of tokens such as"):
        parse_token_count(text, "--tokens")
    with pytest.raises(ConfigError, match=r"--max-shard = .*must be a size such as"):
        parse_byte_size(text, "--max-shard")
