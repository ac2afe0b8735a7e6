"""Ranks that end, that fail, and that hang."""

import sys
import time

import pytest

from shoestring.launch import cli
from shoestring.launch.run import torchrun
from shoestring.launch.run.torchrun import RanksFailed, local_torchrun_arguments, run_local_ranks
from shoestring.launch.verbs import calibrate


def stand_in(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Replace torchrun, which takes seconds to start, by a Python script."""
    monkeypatch.setattr(torchrun, "TORCHRUN_COMMAND", (sys.executable, "-c", script))


def test_ranks_of_one_machine_find_each_other_without_its_name() -> None:
    assert local_torchrun_arguments(4) == ["--rdzv-backend=loopback", "--rdzv-endpoint=127.0.0.1", "--nproc-per-node=4"]


def test_what_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import sys; *own, logs, flag, module = sys.argv[1:]; sys.exit(own != ['--rdzv-backend=loopback', "
    script += "'--rdzv-endpoint=127.0.0.1', '--nproc-per-node=2'] or '--log-dir=' not in logs or module != 'module')"
    stand_in(monkeypatch, script)
    run_local_ranks(["-m", "module"], 2, seconds=60)


def test_a_fault_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "raise SystemExit(7)")
    with pytest.raises(RanksFailed, match="torchrun exit code 7"):
        run_local_ranks([], 1, seconds=60)


def test_ranks_that_do_not_end_are_stopped_and_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: object
) -> None:
    stand_in(monkeypatch, "import time; time.sleep(300)")
    monkeypatch.setattr(calibrate, "_SECONDS", 0.2)
    began = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        cli.main(["calibrate", "--output", f"{tmp_path}/out", "--ranks", "1"])
    assert stop.value.code == 1
    assert time.monotonic() - began < 60
    said = capsys.readouterr().err
    assert said.endswith("shoestring calibrate: the ranks did not end within 0.2 s and were stopped\n")
