"""A growing batch: another program for each size, and equal losses on every layout."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from shoestring.comm.topology import Topology
from shoestring.tests.processes import World, run_processes
from shoestring.tests.trainer.small_loop import LENGTH, losses_of, run_config, run_rank
from shoestring.trainer.build import open_samples
from shoestring.trainer.config import RunConfig
from shoestring.trainer.data.prepared import open_prepared_data
from shoestring.trainer.data.samples import SampleDataset, SampleOrder, TokenBatch
from shoestring.trainer.ledger.summary import summarize_ledger
from shoestring.trainer.structured_config import build_dataclass

SIZES = [4, 4, 8, 12, 16]
"""Sequences of the steps of `RAMP`: three sizes for 8 samples each; the last step of the third has more."""
RAMP: dict[str, Any] = {
    "global_batch_size": 16,
    "rampup_start_batch_size": 4,
    "rampup_batch_size_increment": 4,
    "rampup_tokens": 24 * LENGTH,
    "tokens": sum(SIZES) * LENGTH,
}


@pytest.fixture(scope="module")
def growing_alone(root: Path) -> list[dict[str, Any]]:
    return losses_of(root, "growing alone", Topology(), micro_batch=4, **RAMP)


@pytest.mark.parametrize(
    ("topology", "schedule"),
    [(Topology(ep=4), "1f1b"), (Topology(pp=2), "dualpipe"), (Topology(pp=2, ep=2), "zb_h1")],
    ids=["ep4", "pp2", "pp2ep2"],
)
def test_every_layout_trains_the_same_while_the_batch_grows(
    root: Path, growing_alone: list[dict[str, Any]], topology: Topology, schedule: str
) -> None:
    name = f"growing {schedule}"
    spread = losses_of(root, name, topology, 1, schedule=schedule, **RAMP)
    assert len(spread) == len(growing_alone) == len(SIZES) + 2
    for ours, single in zip(spread, growing_alone, strict=True):
        for key in ("loss", "loss/mtp", "loss/seq_aux", "grad_norm", "bias/max", "bias/min"):
            if key in single:
                assert ours[key] == pytest.approx(single[key], rel=1e-10)
        for key in ("kind", "tokens_per_expert/layer_01", "text", "learning_rate", "tokens"):
            assert ours.get(key) == single.get(key)
    summary = summarize_ledger(root / name)
    assert (summary.steps_retained, summary.tokens_retained) == (len(SIZES), sum(SIZES) * LENGTH)


def test_learning_rates_of_a_growing_batch_follow_its_tokens(root: Path, growing_alone: list[dict[str, Any]]) -> None:
    steps = [values for values in growing_alone if values["kind"] == "step"]
    consumed = [LENGTH * sum(SIZES[:count]) for count in range(1, len(SIZES) + 1)]
    assert [values["tokens"] for values in steps] == consumed
    rate = build_dataclass(RunConfig, run_config(root)).optimizer.learning_rate_at
    assert [values["learning_rate"] for values in steps] == [rate(tokens) for tokens in consumed]
    assert len({values["learning_rate"] for values in steps[:-1]}) > 2


def taken_samples(world: World, tree: dict[str, Any]) -> list[int]:
    """Return the numbers of all training samples, in order."""
    taken: list[int] = []
    batch = SampleDataset.read_batch

    def record(self: SampleDataset, indices: Sequence[int]) -> TokenBatch:
        taken.extend(indices if self.pad_token_id is None else ())
        return batch(self, indices)

    with patch.object(SampleDataset, "read_batch", record):
        run_rank(world, tree)
    return taken


def test_a_growing_batch_takes_every_sample_once_and_in_order(root: Path) -> None:
    tree = run_config(root) | {"schedule": {"micro_batch_size": 2}}
    tree["training"] = tree["training"] | RAMP | {"run_dir": str(root / "taken")}
    (taken,) = run_processes(1, taken_samples, tree)
    samples = build_samples(root)
    assert taken == SampleOrder(0, samples).sample_indices(0, sum(SIZES)).tolist()


def build_samples(root: Path) -> int:
    """Return the number of samples in the training split."""
    config = build_dataclass(RunConfig, run_config(root))
    return len(open_samples(config, open_prepared_data(config.data))[0])
