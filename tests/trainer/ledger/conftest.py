"""The clock of a ledger."""

import pytest

from shoestring.tests.trainer.ledger.small_ledger import Time


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    return Time(monkeypatch)
