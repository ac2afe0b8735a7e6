"""Measured ranks need the predicted memory."""

from __future__ import annotations

import pytest

from shoestring.tests.launch.verbs.memory_command import SMALL, tree


@pytest.mark.slow
@pytest.mark.parametrize("routing", [(), ("--one-rank",)], ids=["as it falls", "one rank"])
def test_real_processes_need_what_is_predicted(capsys: pytest.CaptureFixture[str], routing: tuple[str, ...]) -> None:
    figures = tree(capsys, *SMALL, "topology.ep=2", "training.sequence_length=128", "--measure", *routing)
    assert len(figures["measured"]) == 2
    bound = figures["worst_case_routing_bytes"][0]
    assert all(found["total"] <= bound for found in figures["measured"])
    if not routing:
        for found in figures["measured"]:
            assert found["total"] == pytest.approx(figures["predicted"][0]["total"], rel=0.05)
