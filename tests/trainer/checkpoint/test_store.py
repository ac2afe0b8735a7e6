"""Checkpoints: what is promised, and what a crash may leave behind."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shoestring.comm.groups import ProcessGroups
from shoestring.comm.refusal import Refused
from shoestring.comm.topology import Topology
from shoestring.tests.processes import World, run_processes
from shoestring.trainer.checkpoint.names import named_state
from shoestring.trainer.checkpoint.store import CheckpointStore
from shoestring.trainer.model.config import ModelConfig
from shoestring.trainer.model.init import initialise
from shoestring.trainer.model.model import Model, Share
from shoestring.trainer.optimizer.config import OptimizerConfig
from shoestring.trainer.rank import build_optimizer
from shoestring.trainer.stages import Stages

SHAPE = ModelConfig(hidden=16, layers=2, vocabulary=32, experts=8, expert_ffn=8, dense_ffn=16)


def state_of(groups: ProcessGroups, seed: int) -> dict[str, Tensor]:
    """State of one rank with moments and biases that no two ranks' experts share."""
    topology, rank, stages = groups.topology, groups.rank, Stages.of(SHAPE, 16)
    model = Model(SHAPE, Share.whole(SHAPE, topology.ep, topology.ep_rank(rank)))
    initialise(model, seed)
    optimizer = build_optimizer(model, stages, stages.program(1), groups, OptimizerConfig(), torch.float32)
    for owned in optimizer.owned():
        owned.exp_avg.copy_(2 * owned.master)
        owned.exp_avg_sq.copy_(owned.master.square())
    for _, router in model.routers():
        router.bias_E += seed
    return named_state(model, optimizer, None, rank, {f"rng/rank_{rank:05d}": torch.get_rng_state()})


def save_and_load(world: World, directory: str) -> list[str]:
    """Save seed 1, load into seed 2; names of the tensors that did not come back."""
    topology = Topology(ep=2, edp=2)
    groups = ProcessGroups.create(topology, world.rank, timedelta(seconds=30))
    store = CheckpointStore(Path(directory), keep=2)
    saved, loaded = (state_of(groups, seed) for seed in (1, 2))
    store.save(7, saved, {"step": 7}, groups.world)
    store.load(7, loaded, groups.world)
    return [name for name, tensor in saved.items() if not torch.equal(tensor, loaded[name])]


def test_every_rank_gets_its_own_experts_back(tmp_path: Path) -> None:
    assert run_processes(4, save_and_load, str(tmp_path)) == [[]] * 4


def one_rank() -> ProcessGroups:
    return ProcessGroups.create(Topology(), 0, timedelta(seconds=1))


def test_only_whole_checkpoints_count_and_the_oldest_go(tmp_path: Path) -> None:
    store, world = CheckpointStore(tmp_path, keep=2), one_rank().world
    state = {"weight": torch.ones(3)}
    assert store.steps() == []
    (tmp_path / "step_00000009.partial").mkdir(parents=True)  # a crash in the middle of step 9's
    for step in (1, 2, 3):
        store.save(step, state, {"step": step}, world)
    assert store.steps() == [2, 3]
    assert store.facts(3) == {"step": 3}
    store.save(9, state, {"step": 9}, world)  # the leftover is in nobody's way
    assert store.steps() == [3, 9]
    assert not list(tmp_path.glob("*.partial"))


def test_a_save_that_dies_half_way_leaves_the_one_before(tmp_path: Path) -> None:
    store, world = CheckpointStore(tmp_path, keep=2), one_rank().world
    store.save(1, {"weight": torch.ones(3)}, {"step": 1}, world)
    with pytest.raises(TypeError):
        store.save(2, {"weight": torch.zeros(3)}, {"step": object()}, world)  # fails after the tensors are written
    assert store.steps() == [1]
    loaded = {"weight": torch.empty(3)}
    store.load(1, loaded, world)
    assert torch.equal(loaded["weight"], torch.ones(3))


def test_unreadable_facts_are_named(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, {"weight": torch.ones(3)}, {"step": 1}, one_rank().world)
    (tmp_path / "step_00000001" / "facts.json").write_text("{")
    with pytest.raises(Refused, match="to go on from the checkpoint before it"):
        store.facts(1)


def test_a_crash_while_old_checkpoints_go_leaves_no_half_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, world = CheckpointStore(tmp_path, keep=1), one_rank().world
    store.save(1, {"weight": torch.ones(3)}, {"step": 1}, world)

    def crash(path: Path) -> None:
        (path / ".metadata").unlink()  # as far as the removal came
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shoestring.trainer.checkpoint.store.shutil.rmtree", crash)
        with pytest.raises(KeyboardInterrupt):
            store.save(2, {"weight": torch.ones(3)}, {"step": 2}, world)
    assert store.steps() == [2]
    store.save(3, {"weight": torch.ones(3)}, {"step": 3}, world)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    store, world = CheckpointStore(tmp_path, keep=2), one_rank().world
    store.save(1, {"weight": torch.ones(3)}, {"step": 1}, world)
    (tmp_path / "step_00000001" / ".metadata").unlink()
    with pytest.raises(Refused, match="remove it to go on from the checkpoint before it"):
        store.load(1, {"weight": torch.ones(3)}, world)
