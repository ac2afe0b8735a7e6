"""A run's reports on its steps and on damage to its files, and unattributed time."""

import os
import shutil
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock
from unittest.mock import patch

import pytest
import torch

from shoestring.comm.groups import ProcessGroups
from shoestring.comm.topology import Topology
from shoestring.tests.processes import World, run_processes
from shoestring.tests.trainer.small_loop import BATCH, LENGTH, STEPS, losses_of, run_config, run_rank
from shoestring.trainer.build import build_stage_layout
from shoestring.trainer.config import RunConfig
from shoestring.trainer.data.shard_files import DataChanged
from shoestring.trainer.ledger.summary import summarize_ledger
from shoestring.trainer.loop import train
from shoestring.trainer.run.exit import RankFailed
from shoestring.trainer.run.reporter import STALL_THRESHOLD_SECONDS, UnaccountedTime
from shoestring.trainer.structured_config import build_dataclass


def test_bytes_of_one_step_are_logged_by_link(root: Path) -> None:
    row, weight, sizes = 16 * 8, 8, 16 * 8  # bytes: FP64 rows and gates, int64 counts of all experts
    for values in losses_of(root, "bytes", Topology(ep=2, gpus_per_node=1), micro_batch=4)[:STEPS]:
        expected = 0
        for layer in ("layer_01", "mtp_01"):
            sent, received = BATCH // 2 * LENGTH * 4, sum(values[f"tokens_per_expert/{layer}"][:8])
            expected += sizes + (sent + received) * (2 * row + weight)  # one row each way, forward and backward
        assert values["all_to_all_bytes/loopback"] + values["all_to_all_bytes/infiniband"] == expected
        assert values["all_to_all_bytes/infiniband"] > 0
        assert values["all_to_all_bytes/nvlink"] == 0
        # Half of the dense gradients in FP64, and half of the dense weights. Experts have no replicas here.
        assert values["reduce_scatter_bytes/infiniband"] == values["all_gather_bytes/infiniband"] > 0
        assert values["reduce_scatter_bytes/loopback"] == 0
        payload = (values["all_to_all_payload_bytes/loopback"], values["all_to_all_payload_bytes/infiniband"])
        copies = sum(sum(values[f"tokens_per_expert/{layer}"][:8]) for layer in ("layer_01", "mtp_01"))
        assert sum(payload) == 2 * row * (BATCH // 2 * LENGTH * 4 * 2 + copies)


def test_what_the_routing_means_for_the_wires_is_logged(root: Path) -> None:
    """Sixteen experts in four groups, top 4 of at most two groups; two nodes of two ranks, two groups each."""
    for values in losses_of(root, "visits", Topology(ep=4, gpus_per_node=2), micro_batch=2)[:STEPS]:
        nodes, ranks = values["routing/nodes_per_token"], values["routing/ranks_per_token"]
        assert 1 <= nodes <= ranks <= 2  # one group per rank here
        assert values["routing/experts_per_token_and_node"] == pytest.approx(4 / nodes)
        for layer in ("layer_01", "mtp_01"):
            load = torch.tensor(values[f"tokens_per_expert/{layer}"])
            for kind, count in (("ranks", 4), ("nodes", 2)):
                share = load.view(count, -1).sum(dim=1) / load.sum()
                assert values[f"load/{kind}/{layer}/max_violation"] == pytest.approx(float(share.max()) * count - 1)


def run_and_harm(world: World, tree: dict[str, Any], harm: str) -> str:
    """Train; on rank 0 damage the files between two steps. Return the log of that rank."""
    config = build_dataclass(RunConfig, tree)
    groups = ProcessGroups.create(
        config.topology, world.rank, timedelta(seconds=30), build_stage_layout(config).replica_pp_groups()
    )
    run_dir, asked = Path(config.training.run_dir), [0]

    def stop_asked() -> bool:
        asked[0] += 1
        if asked[0] == 3:  # once before the first step, then at the end of each
            HARMS[harm](run_dir, Path(config.data.prepared))
        return False

    try:
        train(config, groups, torch.device("cpu"), attempt="test", stop_requested=stop_asked)
    except (DataChanged, RankFailed) as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def _flip(run_dir: Path, prepared: Path) -> None:
    shard = min(prepared.glob("*.train.00000.bin"))
    shard.write_bytes(bytes(shard.stat().st_size))


def _empty(run_dir: Path, prepared: Path) -> None:
    for path in run_dir.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _replace(run_dir: Path, prepared: Path) -> None:
    run_dir.rename(run_dir.with_suffix(".moved"))
    run_dir.mkdir()


HARMS: dict[str, Callable[[Path, Path], object]] = {
    "removed": lambda run_dir, prepared: shutil.rmtree(run_dir),
    "moved": lambda run_dir, prepared: run_dir.rename(run_dir.with_suffix(".moved")),
    "emptied": _empty,
    "replaced": _replace,
    "without ledger": lambda run_dir, prepared: os.unlink(run_dir / "ledger" / "work.jsonl"),  # noqa: PTH108
    "other tokens": _flip,
    "metrics removed": lambda run_dir, prepared: os.unlink(run_dir / "metrics.jsonl"),  # noqa: PTH108
}


@pytest.mark.parametrize("harm", HARMS)
def test_damage_to_a_runs_files_in_mid_run_is_reported(root: Path, tmp_path: Path, harm: str) -> None:
    tree = run_config(root)
    shutil.copytree(root / "prepared", tmp_path / "prepared")
    tree["data"] = tree["data"] | {"prepared": str(tmp_path / "prepared")}
    # The samples of the next step are read already when the harm is done.
    more = {"run_dir": str(tmp_path / "run"), "sample_tokens": 0, "tokens": 2 * tree["training"]["tokens"]}
    tree["training"] = tree["training"] | more
    (ended,) = run_processes(1, run_and_harm, tree, harm)
    expected = {"other tokens": ".train.00000.bin has changed since it was prepared", "metrics removed": "done"}
    assert expected.get(harm, "was removed while the run was writing into it, by step 2") in ended


def test_time_that_nothing_accounts_for_is_a_stall(tmp_path: Path) -> None:
    with mock.patch("shoestring.trainer.run.reporter.time.perf_counter") as clock:
        clock.return_value = 10.0
        gaps = UnaccountedTime()
        clock.return_value = 12.0
        gaps.add_accounted(0.5)
        assert gaps.pop_unaccounted_seconds() == pytest.approx(1.495)
        assert gaps.pop_unaccounted_seconds() < 0
        clock.return_value = 20.0
        gaps.add_accounted(8.0)
        assert gaps.pop_unaccounted_seconds() < STALL_THRESHOLD_SECONDS


def run_and_stall(world: World, tree: dict[str, Any]) -> None:
    """Stop the process for a second between two steps, unknown to every part of the loop."""
    with patch("shoestring.trainer.loop.poll_save", lambda *_: time.sleep(0.7)):
        run_rank(world, tree)


def test_a_stop_between_steps_is_in_the_ledger(root: Path, tmp_path: Path) -> None:
    tree = run_config(root)
    tree["training"] = tree["training"] | {"run_dir": str(tmp_path / "run"), "sample_tokens": 0}
    run_processes(1, run_and_stall, tree)
    summary = summarize_ledger(tmp_path / "run")
    assert summary.gpu_ms_by_bucket["stall"] >= 0.6 * 1000 * STEPS
    assert summary.unattributed_ms < 500
