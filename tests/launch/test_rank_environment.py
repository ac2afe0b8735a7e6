"""What ranks start with: defaults where the user has said nothing, and what the launcher has to tell."""

from __future__ import annotations

import pytest

from shoestring.launch.rank_environment import DEFAULTS, rank_environment


def test_the_user_wins_over_defaults_and_the_launcher_over_both(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in DEFAULTS:
        monkeypatch.delenv(name, raising=False)
    assert DEFAULTS.items() <= rank_environment().items()
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("SHOESTRING_ATTEMPT", "outer")
    made = rank_environment({"SHOESTRING_ATTEMPT": "inner"})
    assert made["OMP_NUM_THREADS"] == "7"
    assert made["SHOESTRING_ATTEMPT"] == "inner"
    assert made["MALLOC_TRIM_THRESHOLD_"] == DEFAULTS["MALLOC_TRIM_THRESHOLD_"]
