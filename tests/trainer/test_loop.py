"""The whole loop: data, order, model, gradients, optimizer, checkpoint, ledger."""

from pathlib import Path
from typing import Any

import pytest

from shoestring.comm.topology import Topology
from shoestring.tests.trainer.small_loop import STEPS, losses_of


@pytest.fixture(scope="module")
def alone(root: Path) -> list[dict[str, Any]]:
    return losses_of(root, "alone", Topology(), micro_batch=4)


@pytest.mark.parametrize(
    ("topology", "micro_batch", "exchange", "schedule"),
    [
        (Topology(ep=4), 1, "flat", "1f1b"),
        (Topology(ep=2, edp=2), 2, "flat", "1f1b"),
        (Topology(ep=4, gpus_per_node=2), 1, "two_hop", "dualpipev"),
        (Topology(pp=2, edp=2), 1, "flat", "dualpipe"),
    ],
    ids=["ep4", "ep2edp2", "two nodes", "two pipeline ranks"],
)
def test_every_layout_trains_the_same(
    root: Path, alone: list[dict[str, Any]], topology: Topology, micro_batch: int, exchange: str, schedule: str
) -> None:
    spread = losses_of(root, f"{topology.ep} {exchange} {schedule}", topology, micro_batch, exchange, schedule)
    assert len(alone) == len(spread) == STEPS + 2
    for ours, single in zip(spread, alone, strict=True):
        for key in ("loss", "loss/mtp", "loss/seq_aux", "grad_norm", "bias/max", "bias/min"):
            if key in single:
                assert ours[key] == pytest.approx(single[key], rel=1e-10)
        for key in (
            "kind",
            "tokens_per_expert/layer_01",
            "tokens_per_expert/mtp_01",
            "targets",
            "text",
            "learning_rate",
        ):
            assert ours.get(key) == single.get(key)


def test_the_rate_of_a_step_is_that_of_its_end(alone: list[dict[str, Any]]) -> None:
    rates = [values["learning_rate"] for values in alone if values["kind"] == "step"]
    assert rates == pytest.approx([0.5e-2, 1e-2, 1e-2])  # a warm-up of two steps, then constant
