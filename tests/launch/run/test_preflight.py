"""Checks before the first process of a run starts."""

import errno
import shutil
import socket
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch

from shoestring.comm.errors import ConfigError, Problem, collect_problems
from shoestring.launch.compose import compose_run_config
from shoestring.launch.run import run_dir as run_directory
from shoestring.launch.run.preflight import hardware_problems, run_preflight_checks
from shoestring.launch.run.run_dir import create_run_dir, lock_run_dir
from shoestring.tests.launch.refusals import by_field, refused
from shoestring.tests.tree import ROOT
from shoestring.trainer.checkpoint.compatibility import resume_problems
from shoestring.trainer.checkpoint.store import CheckpointExtras, CheckpointStore
from shoestring.trainer.config import RunConfig
from shoestring.trainer.data.preparation.prepare import prepare_corpus
from shoestring.trainer.data.prepared import open_prepared_data
from shoestring.trainer.model.attention_backend import GpuCapabilities
from shoestring.trainer.telemetry.config import PrometheusConfig


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    root = tmp_path_factory.mktemp("preflight")
    overrides = [f"data.prepared={root / 'data'}", f"training.run_dir={root / 'run'}"]
    composed = compose_run_config(["experiment=quickstart", *overrides])
    prepare_corpus(composed.data, lambda _: None)
    return composed


def test_what_can_run_passes(config: RunConfig) -> None:
    problems: list[Problem] = []
    with collect_problems(problems):
        run_preflight_checks(config, 4, fresh=False)
    assert problems == []


def test_a_port_that_is_taken(config: RunConfig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        prometheus = PrometheusConfig(port=other.getsockname()[1])
        scraped = replace(config, telemetry=replace(config.telemetry, prometheus=prometheus))
        assert set(refused(partial(run_preflight_checks, fresh=False), scraped, 4)) == {"telemetry.prometheus.port"}
        run_preflight_checks(scraped, 4, fresh=False, is_first_node=False)  # only the machine of rank 0 listens there


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpus_that_are_not_there(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match="4 ranks need one GPU each, this machine has 0"):
        run_preflight_checks(replace(config, training=replace(config.training, device="cuda")), 4, fresh=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_an_exchange_that_is_not_there(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match=r"deep_ep is not installed[\s\S]*this machine has 0"):
        run_preflight_checks(replace(config, exchange=replace(config.exchange, name="deepep")), 4, fresh=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_an_fp8_backend_that_is_not_installed(config: RunConfig) -> None:
    for provider in ("triton", "torch", "te"):
        precision = replace(config.precision, linear="fp8", fp8_backend=provider)
        with pytest.raises(ConfigError, match=r"precision\.fp8_backend.*it needs a Hopper GPU"):
            run_preflight_checks(replace(config, precision=precision), 4, fresh=False)
    for provider in ("auto", "reference"):
        precision = replace(config.precision, linear="fp8", fp8_backend=provider)
        run_preflight_checks(replace(config, precision=precision), 4, fresh=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_an_attention_of_gpus_where_there_is_none(config: RunConfig) -> None:
    wanted = replace(config, training=replace(config.training, attention_backend="cudnn"))
    found = refused(partial(run_preflight_checks, fresh=False), wanted, 4)["training.attention_backend"]
    assert found == "'cudnn': is for GPUs, and this machine has 0 for 4 ranks; write auto, or use fewer ranks"


def test_an_attention_that_this_gpu_does_not_have(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(
        GpuCapabilities, "detect", lambda: GpuCapabilities((9, 0), 91002, "flash_attn_interface is not installed")
    )
    for name, why in (("cudnn", "torch has 9.10.2"), ("flash3", "is not installed"), ("efficient", "")):
        wanted = replace(config, training=replace(config.training, attention_backend=name))
        found = by_field(hardware_problems(wanted, 4))
        assert found.keys() == ({"training.attention_backend"} if why else set())
        assert why in found.get("training.attention_backend", "")
    assert not list(hardware_problems(config, 4))


def test_data_that_is_not_there(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Run: shoestring data prepare"):
        run_preflight_checks(replace(config, data=replace(config.data, prepared=str(tmp_path))), 4, fresh=False)


def test_a_shard_of_the_right_size_with_other_bytes(config: RunConfig, tmp_path: Path) -> None:
    prepared = Path(shutil.copytree(config.data.prepared, tmp_path / "data"))
    shard = min(prepared.glob("*.train.00000.bin"))
    shard.write_bytes(b"\xff" * shard.stat().st_size)  # IDs above any vocabulary
    damaged = replace(config, data=replace(config.data, prepared=str(prepared)))
    found = refused(partial(run_preflight_checks, fresh=False), damaged, 4)
    assert list(found) == [str(shard)]
    assert "the file is damaged; remove the directory and prepare again" in found[str(shard)]


def test_everything_that_keeps_a_run_from_starting_is_named_together(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    run_dir = tmp_path / "run"
    with lock_run_dir(run_dir, fresh=False):
        store = CheckpointStore(run_dir / "checkpoints", keep_last=2)
        store.prepare_save(7)
        store.commit_save(
            7, CheckpointExtras({"step": 7, "config": asdict(config), "data": "other", "tokenizer": "other"})
        )
    wrong = replace(
        in_directory(config, run_dir),
        model=replace(config.model, num_attention_heads=2),
        data=replace(config.data, prepared=str(tmp_path / "nowhere")),
    )
    wrong = replace(wrong, training=replace(wrong.training, device="cuda"))
    look = partial(run_preflight_checks, fresh=False)
    assert refused(look, wrong, 4).keys() == {
        "data.prepared",
        "training.device",
        "model.num_attention_heads",
    }
    (store.checkpoint_path(7) / "manifest.json").write_text("{")
    assert "checkpoint" in refused(look, wrong, 4)
    short = replace(config, training=replace(config.training, sequence_length=10**6, device="cuda"))
    assert len(refused(look, short, 4)) == 2


def test_a_vocabulary_of_other_data_and_a_damaged_file_are_named_together(config: RunConfig, tmp_path: Path) -> None:
    prepared = Path(shutil.copytree(config.data.prepared, tmp_path / "data"))
    (prepared / "tokenizer.json").unlink()
    other = replace(config, data=replace(config.data, prepared=str(prepared), vocab_size=300, validation=("hamlet",)))
    found = refused(partial(run_preflight_checks, fresh=False), other, 4)
    assert found.keys() == {"data.vocab_size", "data.validation", str(prepared / "tokenizer.json")}


def test_wandb_online_without_an_account(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    online = replace(config.telemetry, wandb=replace(config.telemetry.wandb, mode="online"))
    online_run = replace(in_directory(config, tmp_path / "run"), telemetry=online)
    found = refused(partial(run_preflight_checks, fresh=False), online_run, 4)
    assert list(found) == ["telemetry.wandb.mode"]
    assert "run `wandb login`, or write offline" in found["telemetry.wandb.mode"]
    assert not (tmp_path / "run").exists()
    run_preflight_checks(online_run, 4, fresh=False, is_first_node=False)  # rank 0 runs on another node


def test_text_too_short_for_one_sample(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match="one sample needs 1000002"):
        run_preflight_checks(replace(config, training=replace(config.training, sequence_length=10**6)), 4, fresh=False)


def test_what_a_checkpoint_holds_on_to(config: RunConfig) -> None:
    data = open_prepared_data(config.data).manifest
    facts = {"step": 7, "config": asdict(config), "data": data.content_hash, "tokenizer": data.tokenizer.sha256}
    assert not list(resume_problems(facts, config, data))
    freer = replace(
        config,
        optimizer=replace(config.optimizer, peak_learning_rate=1e-4),
        training=replace(config.training, tokens=10**7),
        topology=replace(config.topology, pp=4, ep=1),
        schedule=replace(config.schedule, name="zb_h1"),
    )
    assert not list(resume_problems(facts, freer, data))
    other = replace(
        config,
        model=replace(config.model, num_attention_heads=2),
        optimizer=replace(config.optimizer, moments="float32", ema_decay=0.5),
        training=replace(config.training, seed=1),
    )
    found = {problem.field: problem for problem in resume_problems(facts | {"data": "other"}, other, data)}
    moments = {"optimizer.moments", "optimizer.ema_decay"}
    assert set(found) == {"model.num_attention_heads", *moments, "training.seed", "data.prepared"}
    assert "the checkpoint of step 7 has 4" in found["model.num_attention_heads"].hint
    assert "holds other tokens" in found["data.prepared"].hint
    (tokenizer,) = resume_problems(facts | {"tokenizer": "other", "data": "other"}, config, data)
    assert "has another tokenizer" in tokenizer.hint


@pytest.mark.parametrize("fresh", [True, False])
def test_a_directory_that_no_run_has_made(fresh: bool, config: RunConfig, tmp_path: Path) -> None:
    """A directory with a configuration and a run's files is refused too."""
    foreign = Path(shutil.copytree(ROOT / "conf", tmp_path / "conf"))
    (foreign / "thesis.tex").write_text("all of it")
    (foreign / "lock").write_text("")
    (foreign / "ledger").mkdir()
    before = contents(foreign)
    with pytest.raises(ConfigError, match="was not created by a run"), lock_run_dir(foreign, fresh=fresh):
        pass
    with pytest.raises(ConfigError, match="was not created by a run"):
        create_run_dir(foreign)
    with pytest.raises(ConfigError, match="was not created by a run"):
        run_preflight_checks(in_directory(config, foreign), 4, fresh=fresh)
    with (
        pytest.raises(ConfigError, match="was not created by a run"),
        lock_run_dir(foreign / "thesis.tex", fresh=fresh),
    ):
        pass
    assert contents(foreign) == before


def contents(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def in_directory(config: RunConfig, run_dir: Path) -> RunConfig:
    return replace(config, training=replace(config.training, run_dir=str(run_dir)))


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"), lock_run_dir(tmp_path / "file" / "run", fresh=False):
        pass


def test_a_full_disk_leaves_no_directory_and_names_no_file_that_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(path: Path, raw: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "there").mkdir()
    monkeypatch.setattr(run_directory, "replace_file_atomically", fill)
    with pytest.raises(ConfigError, match=r"cannot be written \(No space left on device\); use another directory"):
        create_run_dir(tmp_path / "there" / "new" / "run")
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]
