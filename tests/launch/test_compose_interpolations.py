"""A launch has one start time, and text of the environment is written to no file."""

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import pytest

from shoestring.comm.errors import ConfigError, Problem
from shoestring.launch.compose import compose_run_config, config_to_yaml, read_config
from shoestring.launch.run.fingerprint import run_fingerprint
from shoestring.tests.launch.refusals import refused
from shoestring.trainer.structured_config import restore_interpolations

SECRET = "hunter2"
INSTANT = datetime(2020, 2, 3, 4, 5, 6, tzinfo=UTC)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEAM", SECRET)
    monkeypatch.setenv("BATCH", "48")


def test_one_instant_for_every_key() -> None:
    config = compose_run_config(["training.run_dir=a/${now:%H%M%S.%f}", "data.prepared=b/${now:%H%M%S.%f}"])
    assert config.training.run_dir.removeprefix("a/") == config.data.prepared.removeprefix("b/")
    assert (
        compose_run_config(["training.run_dir=${now:%Y-%m-%d_%H}"], None, INSTANT).training.run_dir == "2020-02-03_04"
    )


@pytest.mark.parametrize(
    "override",
    [
        "training.run_dir=r/${now:%f}",
        "data.prepared=p/${now:%f}",
        "training.start_from=s/${now:%f}",
        "telemetry.wandb.name=n-${now:%f}",
        "training.sample_prompt='at ${now:%f}, ${oc.env:TEAM}'",
        r"training.sample_prompt='\${now:%f}'",
        r"training.sample_prompt='\${oc.env:TEAM} \\${now:%f}'",
    ],
)
def test_what_is_written_is_read_back_the_same(override: str, tmp_path: Path) -> None:
    config = compose_run_config([override])
    (tmp_path / "config.yaml").write_text(config_to_yaml(config))
    assert read_config(tmp_path / "config.yaml") == config
    assert config_to_yaml(read_config(tmp_path / "config.yaml")) == config_to_yaml(config)


def test_a_users_file_may_hold_the_instant(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ntraining:\n  run_dir: r/${now:%Y}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    assert compose_run_config(["experiment=mine"], tmp_path, INSTANT).training.run_dir == "r/2020"


KEYS = ["training.run_dir", "training.sample_prompt", "data.corpus", "data.prepared", "telemetry.wandb.entity"]
KEYS += ["telemetry.wandb.name", "training.start_from", "model.name", "budget.project", "telemetry.prometheus.address"]


@pytest.mark.parametrize("key", KEYS)
def test_text_of_the_environment_stays_unresolved_in_every_file(key: str) -> None:
    more = ["budget.phase=pre_train"] if key == "budget.project" else []
    config = compose_run_config([f"{key}=x/${{oc.env:TEAM}}/${{now:%Y}}", *more], None, INSTANT)
    group, _, name = key.partition(".")
    value = asdict(config)[group]
    for part in name.split("."):
        value = value[part]
    assert value == f"x/{SECRET}/2020"
    assert SECRET not in config_to_yaml(config)
    assert "x/${oc.env:TEAM}/2020" in config_to_yaml(config)
    assert SECRET not in str(restore_interpolations(asdict(config)))
    assert SECRET not in str(Problem(key, value, "is wrong"))
    assert SECRET not in str([fact.display_value for fact in run_fingerprint(config, "data").values()])


def test_a_reference_to_a_secret_is_one() -> None:
    config = compose_run_config(["data.prepared=${oc.env:TEAM}/p", "training.run_dir=${data.prepared}/runs"])
    assert config.training.run_dir == f"{SECRET}/p/runs"
    assert SECRET not in config_to_yaml(config)


def test_numbers_and_choices_of_the_environment_are_written() -> None:
    config = compose_run_config(["training.global_batch_size='${oc.decode:${oc.env:BATCH}}'"])
    assert config.training.global_batch_size == 48
    assert "global_batch_size: 48\n" in config_to_yaml(config)


def test_what_the_environment_does_not_have_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "MISSING" in str(refused(compose_run_config, ["training.run_dir=${oc.env:MISSING}"]))
    (tmp_path / "config.yaml").write_text(config_to_yaml(compose_run_config(["training.run_dir=${oc.env:TEAM}"])))
    monkeypatch.delenv("TEAM")  # on a machine where it is not set
    with pytest.raises(ConfigError, match="TEAM"):
        read_config(tmp_path / "config.yaml")
    for text in ("a: [", "training: 3", "\0", "training: {seed: x}"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(ConfigError):
            read_config(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="No such file"):
        read_config(tmp_path / "none.yaml")
