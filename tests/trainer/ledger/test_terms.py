"""The published phases."""

from shoestring.trainer.ledger.terms import PUBLISHED_GPU_HOURS, PUBLISHED_TOTAL_GPU_HOURS


def test_published_phases_add_up() -> None:
    assert sum(PUBLISHED_GPU_HOURS.values()) == PUBLISHED_TOTAL_GPU_HOURS
