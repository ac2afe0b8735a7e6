"""A forward and a backward that take turns do the same arithmetic as one after the other, to the last bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from shoestring.tests.parity.layouts import Layout, Padding
from shoestring.tests.parity.outcome import Outcome
from shoestring.tests.parity.runner import run_rank
from shoestring.tests.processes import run_processes

STEPS = 3
FP32 = torch.float32
LAYOUTS = [
    Layout(2, 1, 4, 1, Padding.RAGGED, schedule="dualpipev", layers=4, dtype=FP32),
    Layout(2, 1, 4, 0, Padding.RAGGED, schedule="dualpipev", layers=4, dtype=FP32, exchange="two_hop", node_size=1),
    Layout(1, 1, 4, 1, Padding.EMPTY, pp=2, schedule="dualpipe", layers=3, dtype=FP32),
    Layout(2, 1, 6, 2, Padding.RAGGED, pp=2, schedule="dualpipe", dtype=FP32, exchange="two_hop", node_size=1),
    Layout(2, 1, 4, 1, Padding.EMPTY, pp=2, schedule="dualpipev", layers=5, dtype=FP32),
]


def results(outcome: Outcome) -> dict[str, torch.Tensor]:
    """Everything that three steps leave behind."""
    kept = {**outcome.weights, **outcome.biases}
    for number, step in enumerate(outcome.steps):
        kept |= {f"{number} gradient {name}": grad for name, grad in step.gradients.items()}
        losses = (step.total, step.main, step.mtp, step.balance, step.norm)
        kept[f"{number} losses"] = torch.tensor(losses, dtype=torch.float64)
    return kept


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name.replace(" ", "-"))
def test_taking_turns_changes_no_bit(layout: Layout) -> None:
    turns = run_processes(layout.topology.world_size, run_rank, layout, STEPS, None)
    serial = run_processes(layout.topology.world_size, run_rank, replace(layout, overlap=False), STEPS, None)
    for ours, theirs in zip(map(results, turns), map(results, serial), strict=True):
        assert ours.keys() == theirs.keys()
        assert not [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]
