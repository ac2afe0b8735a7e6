"""Launches in unusual surroundings: no output, shadowing modules in the working directory, no `localhost`."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from shoestring.launch.console import print_to_stderr
from shoestring.launch.run.run_dir import read_run_status
from shoestring.tests.launch.real_run import processes_of, wait_for_step, wait_until
from shoestring.tests.launch.small_run import small_run
from shoestring.trainer.ledger.summary import summarize_ledger

SECRET = "correct horse battery staple"


MODULES = ("token", "random", "queue", "wandb", "torch", "trainer", "launch", "yaml", "sitecustomize")


def listening_addresses(pids: list[int]) -> set[str]:
    """Return where these processes listen for TCP connections, in the kernel's notation."""
    inodes = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed since it was listed
                if (target := str(descriptor.readlink())).startswith("socket:["):
                    inodes.add(target[8:-1])
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_launch_without_output_among_strange_modules_leaves_no_trace_but_its_run(tmp_path: Path) -> None:
    """No secret in a file, no listener beyond loopback, one directory for `${now:}`, and SIGHUP is a stop request."""
    here, scratch, runs = tmp_path / "here", tmp_path / "scratch", tmp_path / "runs"
    for folder in (here, scratch, runs):
        folder.mkdir()
    for name in MODULES:
        (here / f"{name}.py").write_text("raise SystemExit('a module of the working directory')")
    overrides = [*small_run(tmp_path / "data", 1), "training.tokens=1e9", "telemetry.log_every=1"]
    overrides += [f"training.run_dir={runs}/${{now:%H%M%S.%f}}", "training.sample_prompt=${oc.env:PROMPT}"]
    overrides += ["telemetry.wandb.mode=offline", "data.corpus=/${oc.env:PROMPT}"]
    command = [sys.executable, "-P", "-m", "shoestring.launch.cli", "train", *overrides]
    environment = os.environ | {"TMPDIR": str(scratch), "PROMPT": SECRET}
    closed = ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash", *command]
    with subprocess.Popen(closed, env=environment, cwd=here, text=True) as process:
        try:
            wait_until(lambda: bool(list(runs.iterdir())) or process.poll() is not None, 60)
            (run_dir,) = runs.iterdir()
            wait_for_step(run_dir, process, 2)
            pids = [process.pid, *processes_of(run_dir)]
            assert len(pids) >= 4
            assert listening_addresses(pids) <= {"0100007F", "00000000000000000000000001000000"}
            process.send_signal(signal.SIGHUP)
            assert process.wait(60) == 75
        finally:
            process.kill()
    assert [path.name for path in runs.iterdir()] == [run_dir.name]
    assert list(scratch.iterdir()) == []
    assert not summarize_ledger(run_dir).is_running
    holders = [path for path in run_dir.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert holders == []


def bare_machine(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `script` with a loopback that is down and no other network; skip if this process may not do that."""
    for flags in (["--net", "--mount"], ["--user", "--map-root-user", "--net", "--mount"]):
        if subprocess.run(["unshare", *flags, "true"], capture_output=True, check=False).returncode == 0:
            command = ["unshare", *flags, "bash", "-ec", script]
            return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    pytest.skip("no namespaces may be made here")


@pytest.mark.skipif(shutil.which("unshare") is None, reason="makes network namespaces by `unshare`")
@pytest.mark.parametrize("has_loopback", [False, True])
def test_a_machine_without_a_network_or_without_localhost(has_loopback: bool, tmp_path: Path) -> None:
    """It needs no name: it runs with an empty /etc/hosts. With loopback down, one sentence says what to do."""
    overrides = [*small_run(tmp_path, 1), "telemetry.wandb.mode=offline", f"training.run_dir={tmp_path / 'run'}"]
    train = shlex.join([sys.executable, "-m", "shoestring.launch.cli", "train", *overrides])
    prepare = ": > hosts; mount --bind hosts /etc/hosts; ip link set lo up; " if has_loopback else ""
    began = time.monotonic()
    done = bare_machine(prepare + train, tmp_path)
    if has_loopback:
        assert done.returncode == 0, done.stderr
        assert read_run_status(tmp_path / "run") == {"exit_code": 0, "reason": "1 steps done"}
        return
    assert time.monotonic() - began < 30
    refused, problem = done.stderr.splitlines()
    assert (done.returncode, refused) == (2, "shoestring train: error: invalid configuration (nothing was started)")
    assert problem.startswith("  localhost = '127.0.0.1': this machine cannot reach itself")
    assert not (tmp_path / "run").exists()


def test_output_that_cannot_be_printed_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        print_to_stderr("something")
        monkeypatch.undo()
        with pytest.raises(OSError, match="No space"):
            full.close()
