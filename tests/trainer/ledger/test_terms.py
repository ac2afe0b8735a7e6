"""The published phases, and units."""

from __future__ import annotations

from shoestring.trainer.ledger.render import format_gpu_hours, format_percent
from shoestring.trainer.ledger.terms import PUBLISHED_GPU_HOURS, PUBLISHED_TOTAL_GPU_HOURS


def test_published_phases_add_up_and_units_are_written() -> None:
    assert sum(PUBLISHED_GPU_HOURS.values()) == PUBLISHED_TOTAL_GPU_HOURS
    assert [format_gpu_hours(value) for value in (0.01234, 123.456, 2664000)] == ["0.0123", "123.46", "2,664,000"]
    assert [format_percent(share) for share in (0, 0.0834, 1.5e-8)] == ["0.0 %", "8.3 %", "1.5e-06 %"]
