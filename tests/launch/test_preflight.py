"""What is refused before the first process of a run exists."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from shoestring.comm.bootstrap import WorkerEnvironment
from shoestring.comm.refusal import Refused
from shoestring.launch.compose import compose_run
from shoestring.launch.preflight import preflight
from shoestring.launch.run_dir import CONFIG_FILE, claimed, own
from shoestring.tests.tree import ROOT
from shoestring.trainer.checkpoint.compatible import incompatibilities
from shoestring.trainer.config import RunConfig
from shoestring.trainer.data.prepare import prepare


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    root = tmp_path_factory.mktemp("preflight")
    composed = compose_run(["experiment=quickstart", f"data.prepared={root / 'data'}"])
    prepare(composed.data, lambda _: None)
    return composed


def test_what_can_run_passes(config: RunConfig) -> None:
    preflight(config, 4, fresh=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpus_that_are_not_there(config: RunConfig) -> None:
    with pytest.raises(Refused, match="4 ranks need a GPU each and this machine has 0"):
        preflight(replace(config, training=replace(config.training, device="cuda")), 4, fresh=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_an_exchange_that_is_not_there(config: RunConfig) -> None:
    with pytest.raises(Refused, match=r"deep_ep is not installed[\s\S]*this machine has 0"):
        preflight(replace(config, exchange=replace(config.exchange, name="deepep")), 4, fresh=False)


def test_data_that_is_not_there(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="run `shoestring data prepare` first"):
        preflight(replace(config, data=replace(config.data, prepared=str(tmp_path))), 4, fresh=False)


def test_text_too_short_for_one_sample(config: RunConfig) -> None:
    with pytest.raises(Refused, match="one sample needs 1000002"):
        preflight(replace(config, training=replace(config.training, sequence_length=10**6)), 4, fresh=False)


def test_what_a_checkpoint_holds_on_to(config: RunConfig) -> None:
    facts = {"step": 7, "config": asdict(config), "data": "digest"}
    assert not list(incompatibilities(facts, config, "digest"))
    freer = replace(
        config,
        optimizer=replace(config.optimizer, peak_learning_rate=1e-4),
        training=replace(config.training, tokens=10**7),
    )
    assert not list(incompatibilities(facts, freer, "digest"))
    other = replace(config, model=replace(config.model, heads=2), training=replace(config.training, seed=1))
    found = {problem.field: problem for problem in incompatibilities(facts, other, "other digest")}
    assert set(found) == {"model.heads", "training.seed", "data.prepared"}
    assert "the checkpoint of step 7 has 4" in found["model.heads"].remedy


@pytest.mark.parametrize("fresh", [True, False])
def test_a_directory_that_no_run_has_made(fresh: bool, config: RunConfig, tmp_path: Path) -> None:
    """Also one that holds a configuration and what a run leaves."""
    foreign = Path(shutil.copytree(ROOT / "conf", tmp_path / "conf"))
    (foreign / "thesis.tex").write_text("all of it")
    (foreign / "lock").write_text("")
    (foreign / "ledger").mkdir()
    before = contents(foreign)
    with pytest.raises(Refused, match="was not made by a run"), claimed(foreign, fresh=fresh):
        pass
    with pytest.raises(Refused, match="was not made by a run"):
        own(foreign)
    with pytest.raises(Refused, match="was not made by a run"):
        preflight(in_directory(config, foreign), 4, fresh=fresh)
    with pytest.raises(Refused, match="was not made by a run"), claimed(foreign / "thesis.tex", fresh=fresh):
        pass
    assert contents(foreign) == before


def contents(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def in_directory(config: RunConfig, run_dir: Path) -> RunConfig:
    return replace(config, training=replace(config.training, run_dir=str(run_dir)))


def test_a_fresh_run_removes_links_and_not_what_they_point_to(tmp_path: Path) -> None:
    elsewhere, run_dir = tmp_path / "big_disk", tmp_path / "run"
    elsewhere.mkdir()
    (elsewhere / "step_00000001").write_text("")
    with claimed(run_dir, fresh=False):
        (run_dir / "checkpoints").symlink_to(elsewhere)
        (run_dir / "metrics.jsonl").symlink_to(tmp_path / "nowhere")
        (run_dir / "ledger").mkdir()
    with claimed(run_dir, fresh=True):
        assert {path.name for path in run_dir.iterdir()} == {"lock", ".shoestring_run"}
    assert (elsewhere / "step_00000001").exists()


def test_a_reason_is_given_where_the_system_gives_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise OSError(f"no way to remove {path.name}")

    with claimed(tmp_path / "run", fresh=False):
        (tmp_path / "run" / "ledger").mkdir()
    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(Refused, match="no way to remove ledger"), claimed(tmp_path / "run", fresh=True):
        pass


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="cannot be written"), claimed(tmp_path / "file" / "run", fresh=False):
        pass


def test_two_launchers_of_one_directory(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with claimed(run_dir, fresh=False):
        (run_dir / CONFIG_FILE).write_text("")
        with pytest.raises(Refused, match="another run is going on"), claimed(run_dir, fresh=True):
            pass
        assert (run_dir / CONFIG_FILE).exists()
    with claimed(run_dir, fresh=True):
        assert not (run_dir / CONFIG_FILE).exists()


def test_half_of_torchruns_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(Refused, match="MASTER_ADDR"):
        WorkerEnvironment.read()
