"""The benchmark of FP8 accumulation."""

from shoestring.benchmarks import fp8_accumulation


def test_promotion_is_worth_ten_times_at_the_reports_length() -> None:
    assert fp8_accumulation.relative_error(4096, None) > 10 * fp8_accumulation.relative_error(4096, 128)
