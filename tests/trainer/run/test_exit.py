"""Ends of a run before its last token: a rank that raises, a request to stop, a used-up budget."""

import json
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from shoestring.comm.groups import ProcessGroups
from shoestring.tests.processes import RanksFailed, World, run_processes
from shoestring.tests.trainer.small_loop import BATCH, LENGTH, STEPS, run_config, run_rank
from shoestring.trainer.config import RunConfig
from shoestring.trainer.ledger.budget_guard import CostMeter
from shoestring.trainer.ledger.summary import summarize_ledger
from shoestring.trainer.loop import train
from shoestring.trainer.run.exit import RunHalted
from shoestring.trainer.run.stage_runner import StageRunner
from shoestring.trainer.run.step import Stepper, StepResult
from shoestring.trainer.structured_config import build_dataclass
from shoestring.trainer.telemetry.history import read_metrics


def one_rank_raises(world: World, tree: dict[str, Any]) -> None:
    def broken(*_: object) -> None:
        raise ValueError("the stage is broken")

    with patch.object(StageRunner, "forward", broken) if world.rank == 1 else nullcontext():
        run_rank(world, tree)


def test_a_rank_that_raises_ends_the_run_without_a_timeout(root: Path) -> None:
    """A message that its neighbor will never send is pending, with a limit of 30 seconds."""
    tree = run_config(root) | {"topology": {"pp": 2}, "schedule": {"name": "1f1b"}}
    tree["training"] = tree["training"] | {"run_dir": str(root / "raises")}
    began = time.monotonic()
    with pytest.raises(RanksFailed) as failure:
        run_processes(2, one_rank_raises, tree)
    assert time.monotonic() - began < 25
    assert str(failure.value).startswith("rank 1 of 2 failed:")
    assert "ValueError: the stage is broken" in str(failure.value)


LOOKS = 4
"""Polls of the stop request per evaluation of the runs below: one per round of micro-batches."""


def train_until(world: World, tree: dict[str, Any], looks: int, spent_in_a_step: float) -> tuple[int, str] | None:
    """Train; the last rank alone asks to stop, after `looks` polls. Return exit code and reason of a halt."""
    run_dir, asked = Path(tree["training"]["run_dir"]), iter(range(looks))
    config = build_dataclass(RunConfig, tree)
    groups = ProcessGroups.create(config.topology, world.rank, timedelta(seconds=30))

    begun = summarize_ledger(run_dir).steps_retained if run_dir.exists() else 0
    dist.barrier()  # the first rank to train creates the directory
    step, taken = Stepper.step, list[int]()

    def counted(self: Stepper, *arguments: Any) -> StepResult:
        taken.append(len(taken))
        return step(self, *arguments)

    def spent(meter: CostMeter) -> float:
        return spent_in_a_step * (begun + len(taken))

    with mock.patch.object(CostMeter, "gpu_hours", spent), mock.patch.object(Stepper, "step", counted):
        try:
            stop_asked = (lambda: next(asked, None) is None) if world.rank == world.size - 1 else lambda: False
            train(config, groups, torch.device("cpu"), "test", stop_asked)
        except RunHalted as halted:
            return int(halted.reason), str(halted)
    return None


def on_two_ranks(root: Path, name: str, **training: object) -> dict[str, Any]:
    tree = run_config(root) | {"topology": {"ep": 2}, "schedule": {"micro_batch_size": 2}}
    tree["training"] = tree["training"] | {"run_dir": str(root / name), "evaluate_every": 1} | training
    return tree


def reported(tree: dict[str, Any]) -> list[tuple[str, int, Any]]:
    events = read_metrics(Path(tree["training"]["run_dir"]) / "metrics.jsonl")
    known = [event for event in events if event.kind in ("step", "evaluation", "sample")]
    return [(event.kind, event.step, event.values.get("loss", event.values.get("text"))) for event in known]


def test_one_rank_that_is_asked_halts_all_after_the_same_step_and_nothing_is_lost(root: Path) -> None:
    undisturbed, tree = on_two_ranks(root, "undisturbed"), on_two_ranks(root, "halted", checkpoint_every=0)
    assert run_processes(2, train_until, undisturbed, 100, 0.0) == [None, None]
    reason = "stopped before the first step: a stop was requested; the same command continues the run"
    assert run_processes(2, train_until, tree, 0, 0.0) == [(75, reason)] * 2
    reason = "stopped after step 2, which is in a checkpoint: a stop was requested; the same command continues the run"
    assert run_processes(2, train_until, tree, 2 + LOOKS, 0.0) == [(75, reason)] * 2
    assert reported(tree) == reported(undisturbed)[:3]  # the evaluation of step 2 is still due
    assert run_processes(2, train_until, tree, 100, 0.0) == [None, None]
    assert reported(tree) == reported(undisturbed)
    summary = summarize_ledger(root / "halted")
    assert summary.steps_retained == STEPS
    assert (summary.rolled_back_ms, summary.is_running) == (0, False)


@pytest.mark.parametrize("checkpoint_every", [0, 2])
def test_a_stop_in_an_evaluation_is_served_at_the_next_micro_batch(root: Path, checkpoint_every: int) -> None:
    undisturbed = on_two_ranks(root, f"whole{checkpoint_every}")
    tree = on_two_ranks(root, f"left{checkpoint_every}", checkpoint_every=checkpoint_every)
    assert run_processes(2, train_until, undisturbed, 100, 0.0) == [None, None]
    reason = "after step 2, which is in a checkpoint: a stop was requested; the same command continues the run"
    # In the evaluation; before it is repeated; in its repetition.
    for looks, where in (2 + LOOKS + 1 + 2, "in the evaluation "), (0, ""), (1 + 2, ""):
        halted = run_processes(2, train_until, tree, looks, 0.0)
        assert halted == [(75, f"stopped {where}{reason}")] * 2
        assert reported(tree) == reported(undisturbed)[:3]
    last = run_processes(2, train_until, tree, 1 + LOOKS + 1 + 2, 0.0)  # during the evaluation of the last step
    assert "in the evaluation after step 3" in str(last)
    text = run_processes(2, train_until, tree, LOOKS + 1, 0.0)  # at the second token of the sample
    assert "in the sample after step 3, which is in a checkpoint" in str(text)
    assert run_processes(2, train_until, tree, 100, 0.0) == [None, None]
    assert reported(tree) == reported(undisturbed)
    assert summarize_ledger(Path(tree["training"]["run_dir"])).rolled_back_ms == 0


def test_a_checkpoint_that_is_due_comes_before_the_evaluation_which_is_reported_once(root: Path) -> None:
    tree = on_two_ranks(root, "longer", checkpoint_every=1)
    assert run_processes(2, train_until, tree, 100, 0.0) == [None, None]
    manifest = json.loads((root / "longer" / "checkpoints" / "step_00000003" / "manifest.json").read_text())
    assert manifest["metadata"]["evaluation_pending"]
    tree["training"] = tree["training"] | {"tokens": (STEPS + 1) * LENGTH * BATCH, "sample_tokens": 0}
    assert run_processes(2, train_until, tree, 100, 0.0) == [None, None]
    assert [step for kind, step, _ in reported(tree) if kind == "evaluation"] == [1, 2, 3, 4]


def test_the_budget_guard_halts_the_run_until_its_budget_is_raised(root: Path) -> None:
    tree = on_two_ranks(root, "guarded", tokens=5 * LENGTH * BATCH, checkpoint_every=0)
    first, other = run_processes(2, train_until, tree, 100, 0.4)
    hint = "the run has used 1.2 GPU-hours and its budget is 1; raise budget.gpu_hours to continue"
    assert first == (3, f"stopped after step 3, which is in a checkpoint: {hint}")
    assert other is not None
    assert other[0] == 3
    before = reported(tree)
    assert run_processes(2, train_until, tree, 0, 0.4)[0] == first  # also when it is asked to stop
    assert reported(tree) == before
    assert run_processes(2, train_until, tree | {"budget": {"gpu_hours": 2.5}}, 100, 0.4) == [None, None]
    assert [step for kind, step, _ in reported(tree) if kind == "step"] == [1, 2, 3, 4, 5]
    summary = summarize_ledger(root / "guarded")
    assert summary.gpu_ms_by_bucket["checkpoint_save"] > 0
    assert summary.rolled_back_ms == 0
    assert 0 <= summary.unattributed_ms < summary.allocated_ms
