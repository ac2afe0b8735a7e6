"""A rank started by another launcher."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.launch.compose import compose_run_config
from shoestring.launch.run import train, worker
from shoestring.launch.run.run_dir import lock_run_dir, read_run_status
from shoestring.launch.run.signals import LAUNCHER_PID_ENV_VAR
from shoestring.tests.launch.rank_variables import in_torchrun
from shoestring.tests.launch.small_run import free_port, small_run


@pytest.mark.parametrize("rank", [0, 3])
def test_a_rank_without_the_launcher_exits_with_the_true_code_and_says_why(
    rank: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(worker, "install_stop_handlers", lambda seconds: lambda: False)
    in_torchrun(monkeypatch, RANK=str(rank), WORLD_SIZE="8", LOCAL_RANK=str(rank))
    run = ["topology=single", "schedule=1f1b", "training.device=cpu", f"training.run_dir={tmp_path / 'run'}"]
    assert train.train_command(run, None, fresh=False) == 2
    assert "world size = 8: topology needs 1 processes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("world_size", "words"), [("1", "another run is active"), ("8", "topology needs 1 proc")])
def test_a_second_launch_without_the_launcher_leaves_a_live_run_alone(
    world_size: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(worker, "install_stop_handlers", lambda seconds: lambda: False)
    in_torchrun(monkeypatch, RANK="0", WORLD_SIZE=world_size)
    run_dir = tmp_path / "run"
    run = ["topology=single", "schedule=1f1b", "training.device=cpu", f"training.run_dir={run_dir}"]
    with lock_run_dir(run_dir, fresh=False):
        for name in ("config.yaml", "run_status.json", "ended"):
            (run_dir / name).write_text("the live run's")
        before = {path: path.read_bytes() for path in run_dir.iterdir()}
        try:
            assert train.train_command(run, None, fresh=False) == 2
            told = capsys.readouterr().err
        except ConfigError as refused:
            told = str(refused)
        assert words in told
        assert {path: path.read_bytes() for path in run_dir.iterdir()} == before


def test_the_launcher_is_refused_while_a_run_without_it_is_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(LAUNCHER_PID_ENV_VAR, raising=False)
    config = compose_run_config(["topology=single", "schedule=1f1b", f"training.run_dir={tmp_path / 'run'}"])
    with (
        worker._hold_run_dir(config),
        pytest.raises(ConfigError, match="another run is active"),
        lock_run_dir(tmp_path / "run", fresh=True),
    ):
        pass


def test_a_refusal_in_a_container_is_no_success(tmp_path: Path) -> None:
    overrides = [*small_run(tmp_path, 1), "topology.ep=1", "schedule=1f1b", "training.sequence_length=100000"]
    variables = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    command = [
        sys.executable,
        "-m",
        "shoestring.launch.cli",
        "train",
        *overrides,
        f"training.run_dir={tmp_path / 'run'}",
    ]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert "the train split has" in done.stderr
    status = read_run_status(tmp_path / "run")
    assert status is not None
    assert status["exit_code"] == 2
