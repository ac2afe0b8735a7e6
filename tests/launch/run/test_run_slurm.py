"""launch/slurm/pretrain.sbatch under a real Slurm: a controller and three node daemons on this machine."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from shoestring.launch.run.run_dir import read_run_status
from shoestring.tests.launch.machines import wait_until
from shoestring.tests.launch.real_run import processes_of, train
from shoestring.tests.launch.small_run import free_port, small_run
from shoestring.tests.launch.two_machines import losses
from shoestring.tests.trainer.telemetry.offline_run import read_offline_run
from shoestring.tests.tree import ROOT
from shoestring.trainer.ledger.summary import summarize_ledger
from shoestring.trainer.ledger.terms import ALLOCATION_FILE

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol", "srun")
MISSING = [program for program in PROGRAMS if shutil.which(program) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"Slurm is not installed: no {', '.join(MISSING)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="Slurm's node daemons need root"),
]
STEPS = 80
NODES = ("node1", "node2", "node3")
ONE_RANK_EACH = ("topology.gpus_per_node=1", "telemetry.log_every=1")
SETTINGS = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PropagateResourceLimits=NONE
SchedulerParameters=sched_interval=2
SlurmdTimeout=8
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=node[1-3] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[3]}] CPUs=8 RealMemory=1000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Slurm:
    environment: dict[str, str]
    folder: Path
    nodes: dict[str, subprocess.Popen[bytes]]
    """The daemon of each node."""

    def start_node(self, name: str) -> None:
        with (self.folder / f"{name}.log").open("a") as log:
            command = ["slurmd", "-D", "-N", name, "-f", str(self.folder / "slurm.conf")]
            self.nodes[name] = subprocess.Popen(command, stdout=log, stderr=log, env=self.environment)

    def call(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, output: Path, *arguments: str) -> str:
        flags = ["--gpus-per-node=0", "--time=20", "--signal=USR1@5", f"--output={output}"]
        return self.call("sbatch", "--parsable", *flags, "launch/slurm/pretrain.sbatch", *arguments)

    def job(self, number: str) -> dict[str, str]:
        words = self.call("scontrol", "-o", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def has_ended(self, number: str) -> bool:
        return self.job(number)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def some_ports() -> tuple[int, ...]:
    """Return a free port, and three consecutive ones."""
    while True:
        with ExitStack() as held:
            probes = [held.enter_context(socket.socket()) for _ in range(4)]
            try:
                probes[0].bind(("127.0.0.1", 0))
                probes[1].bind(("127.0.0.1", 0))
                for place in (2, 3):
                    probes[place].bind(("127.0.0.1", probes[1].getsockname()[1] + place - 1))
            except (OSError, OverflowError):
                continue
            return tuple(int(probe.getsockname()[1]) for probe in probes)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Start a cluster of idle nodes, one more than jobs take; its jobs and daemons end with the tests."""
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", *(f"spool_{node}" for node in NODES)):
        (folder / name).mkdir()
    settings = folder / "slurm.conf"
    host = socket.gethostname().split(".")[0]
    settings.write_text(SETTINGS.format(host=host, ports=some_ports(), folder=folder))
    outside = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
    own = {"SLURM_CONF": str(settings), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    # node1 is no name that resolves; job 1 of two clusters on one machine would take one port.
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    cluster = Slurm(outside | own | rendezvous, folder, {})
    with ExitStack() as cleanup:
        log = cleanup.enter_context((folder / "controller.log").open("w"))
        command = ["slurmctld", "-D", "-c", "-f", str(settings)]
        controller = subprocess.Popen(command, stdout=log, stderr=log, env=cluster.environment)
        cleanup.callback(controller.wait, 20)
        cleanup.callback(controller.terminate)
        cleanup.callback(end_nodes, cluster)
        for name in NODES:
            cluster.start_node(name)
        wait_until(lambda: idle_nodes(cluster) == len(NODES), 20)
        yield cluster
        subprocess.run(["scancel", "--full", "--user=root"], env=cluster.environment, timeout=30, check=False)
        wait_until(lambda: not cluster.call("squeue", "--noheader"), 30)


def end_nodes(cluster: Slurm) -> None:
    for daemon in cluster.nodes.values():
        daemon.terminate()
    for daemon in cluster.nodes.values():
        daemon.wait(20)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, object, object]]:
    """Return the losses of the run that the tests submit, on one machine and without Slurm."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    overrides = small_run(tmp_path_factory.mktemp("data"), STEPS)
    done = train([*overrides, *ONE_RANK_EACH], run_dir)
    assert done.returncode == 0, done.stderr
    return losses(run_dir)


def has_made_a_step(run_dir: Path) -> bool:
    metrics = run_dir / "metrics.jsonl"
    return metrics.exists() and '"kind": "step"' in metrics.read_text()


def idle_nodes(cluster: Slurm) -> int:
    command = ["sinfo", "--noheader", "--Node", "--format=%T"]
    done = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.split().count("idle")


@pytest.mark.timeout(300)
def test_a_requeued_job_resumes_from_its_checkpoint(
    slurm: Slurm, undisturbed: list[tuple[int, object, object]], tmp_path: Path
) -> None:
    run_dir, output = tmp_path / "run", tmp_path / "job.out"
    own = [
        "topology.gpus_per_node=1",
        "telemetry.log_every=1",
        "training.checkpoint_every=20",
        f"training.run_dir={run_dir}",
    ]
    job = slurm.submit(output, "--fresh", *small_run(tmp_path, STEPS), *own)
    wait_until(lambda: (run_dir / "checkpoints" / "step_00000020").exists() or slurm.has_ended(job), 120)
    slurm.call("scontrol", "requeue", job)
    wait_until(lambda: slurm.job(job)["JobState"] == "PENDING", 90)  # it begins when its credential has expired
    wait_until(lambda: slurm.has_ended(job), 120)

    text = output.read_text()
    assert {key: slurm.job(job)[key] for key in ("JobState", "ExitCode", "Restarts", "NumNodes")} == {
        "JobState": "COMPLETED",
        "ExitCode": "0:0",
        "Restarts": "1",
        "NumNodes": "2",
    }, text
    assert f"Job {job}, start 1, on node[1-2]" in text
    assert f"Job {job}, start 2, on node[1-2]" in text
    assert "resume at step" in text  # the second life was not --fresh
    assert losses(run_dir) == undisturbed
    assert read_run_status(run_dir) == {"exit_code": 0, "reason": f"{STEPS} steps done"}
    summary = summarize_ledger(run_dir)
    assert summary.num_attempts == 2
    assert not summary.is_running


@pytest.mark.timeout(300)
def test_a_job_that_is_told_to_stop_requeues_itself_and_loses_no_step(
    slurm: Slurm, undisturbed: list[tuple[int, object, object]], tmp_path: Path
) -> None:
    run_dir, output = tmp_path / "run", tmp_path / "job.out"
    own = [
        "topology.gpus_per_node=1",
        "telemetry.log_every=1",
        "training.checkpoint_every=0",
        f"training.run_dir={run_dir}",
    ]
    job = slurm.submit(output, *small_run(tmp_path, STEPS), *own)
    wait_until(lambda: has_made_a_step(run_dir) or slurm.has_ended(job), 120)
    slurm.call("scancel", "--signal=USR1", job)  # as --signal does before the time is up
    wait_until(lambda: slurm.job(job)["JobState"] == "PENDING" or slurm.has_ended(job), 60)
    text = output.read_text()
    assert slurm.job(job)["Restarts"] == "1", text
    assert "which is in a checkpoint: a stop was requested" in text, text
    wait_until(lambda: slurm.has_ended(job), 120)
    assert slurm.job(job)["JobState"] == "COMPLETED", output.read_text()
    assert read_run_status(run_dir) == {"exit_code": 0, "reason": f"{STEPS} steps done"}
    summary = summarize_ledger(run_dir)
    assert (summary.steps_retained, summary.rolled_back_ms, summary.num_attempts) == (STEPS, 0, 2)
    assert losses(run_dir) == undisturbed


@pytest.mark.timeout(400)
def test_a_job_whose_first_node_is_lost_is_requeued_and_waits_for_the_launcher_that_is_left(
    slurm: Slurm, undisturbed: list[tuple[int, object, object]], tmp_path: Path
) -> None:
    """The node's daemon is killed; its launcher, which holds the run directory, keeps running."""
    run_dir, output = tmp_path / "run", tmp_path / "job.out"
    own = [*ONE_RANK_EACH, "training.checkpoint_every=0"]
    job = slurm.submit(output, *small_run(tmp_path, STEPS), *own, f"training.run_dir={run_dir}")
    wait_until(lambda: has_made_a_step(run_dir) or slurm.has_ended(job), 120)
    (launcher,) = (pid for pid, line in processes_of(run_dir).items() if is_launcher(line) and node_of(pid) == "0")
    os.kill(launcher, signal.SIGSTOP)  # it holds on longer than it would
    slurm.nodes["node1"].kill()
    slurm.nodes["node1"].wait()
    wait_until(lambda: slurm.job(job)["JobState"] == "PENDING" or slurm.has_ended(job), 120)
    assert slurm.job(job)["Restarts"] == "1", output.read_text()
    wait_until(lambda: "waiting up to 120 s for the previous launch" in output.read_text(), 120)
    assert "start 2, on node[2-3]" in output.read_text()
    os.kill(launcher, signal.SIGCONT)
    wait_until(lambda: slurm.has_ended(job), 180)
    assert slurm.job(job)["JobState"] == "COMPLETED", output.read_text()
    assert losses(run_dir) == undisturbed
    slurm.start_node("node1")
    wait_until(lambda: idle_nodes(slurm) == len(NODES), 60)


def is_launcher(line: str) -> bool:
    return "shoestring.launch.run.node" in line


def node_of(pid: int) -> str:
    """Return the number of the machine that the launcher `pid` is for."""
    variables = (variable.partition(b"=") for variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    return next(value.decode() for name, _, value in variables if name == b"NODE_RANK")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", ["scancel", "TERM to the whole step"])
def test_a_job_that_is_ended_says_so_in_a_few_lines_and_resumes_when_it_is_submitted_again(
    how: str, slurm: Slurm, undisturbed: list[tuple[int, object, object]], tmp_path: Path
) -> None:
    """wandb has its last state, although wandb's process is sent SIGTERM with all others."""
    run_dir, output = tmp_path / "run", tmp_path / "job.out"
    arguments = [*small_run(tmp_path, STEPS), *ONE_RANK_EACH, "training.checkpoint_every=0"]
    arguments += [f"training.run_dir={run_dir}", "telemetry.wandb.mode=offline"]
    job = slurm.submit(output, *arguments)
    wait_until(lambda: has_made_a_step(run_dir) or slurm.has_ended(job), 120)
    before = len(output.read_text().splitlines())
    slurm.call("scancel", job) if how == "scancel" else slurm.call("scancel", "--signal=TERM", f"{job}.0")
    wait_until(lambda: slurm.has_ended(job) or slurm.job(job)["JobState"] == "PENDING", 90)
    wait_until(lambda: not processes_of(run_dir), 60)
    lines = [line for line in output.read_text().splitlines()[before:] if not line.startswith("step ")]
    last = r"Job \d+ is [A-Z]+: Slurm ends or requeues it" if how == "scancel" else r"is requeued|DUE TO JOB REQUEUE"
    assert re.search(last, lines[-1]), "\n".join(lines)
    assert len(lines) <= 10, "\n".join(lines)
    assert any("which is in a checkpoint: a stop was requested" in line for line in lines), "\n".join(lines)
    states = [read_offline_run(path).summary for path in (run_dir / "wandb").glob("offline-run-*/*.wandb")]
    assert any("which is in a checkpoint" in str(state.get("stop/reason")) for state in states)
    if how == "scancel":
        job = slurm.submit(output, *arguments)
    wait_until(lambda: slurm.has_ended(job), 150)
    assert slurm.job(job)["JobState"] == "COMPLETED", output.read_text()
    assert losses(run_dir) == undisturbed


def test_a_refused_run_fails_the_job_with_2(slurm: Slurm, tmp_path: Path) -> None:
    output = tmp_path / "job.out"
    job = slurm.submit(output, "training.device=cpu", "topology.ep=4", "topology.gpus_per_node=8")
    wait_until(lambda: slurm.has_ended(job), 120)
    assert slurm.job(job)["ExitCode"] == "2:0", output.read_text()
    assert slurm.job(job)["JobState"] == "FAILED"
    assert "write topology.gpus_per_node=2" in output.read_text()


@pytest.mark.timeout(300)
def test_a_job_whose_notice_comes_in_its_first_minutes_is_requeued_as_long_as_it_makes_steps(
    slurm: Slurm, tmp_path: Path
) -> None:
    """The notice comes a minute or two after the start; Slurm sends it up to a minute early."""
    run_dir, output = tmp_path / "run", tmp_path / "job.out"
    own = ["topology.gpus_per_node=1", "training.checkpoint_every=0", f"training.run_dir={run_dir}"]
    flags = ["--gpus-per-node=0", "--time=20", "--signal=USR1@1130", f"--output={output}"]
    job = slurm.call("sbatch", "--parsable", *flags, "launch/slurm/pretrain.sbatch", *small_run(tmp_path, 10**6), *own)
    wait_until(lambda: slurm.job(job)["Restarts"] == "1" or slurm.has_ended(job), 250)
    assert slurm.job(job)["Restarts"] == "1", output.read_text()
    assert summarize_ledger(run_dir).steps_retained > 0
    slurm.call("scancel", job)
    wait_until(lambda: slurm.has_ended(job), 60)


def has_begun(run_dir: Path, life: int) -> bool:
    """Return whether this attempt's launcher holds the directory and handles signals; its ranks start seconds later."""
    path = run_dir / ALLOCATION_FILE
    return path.exists() and path.read_text().count('"kind":"open"') >= life


@pytest.mark.timeout(300)
def test_a_job_that_never_makes_a_step_is_not_requeued_without_end(slurm: Slurm, tmp_path: Path) -> None:
    """Every attempt is stopped while its machines meet or its ranks start."""
    run_dir, output = tmp_path / "run", tmp_path / "job.out"
    own = ["topology.gpus_per_node=1", f"training.run_dir={run_dir}"]
    job = slurm.submit(output, *small_run(tmp_path, STEPS), *own)
    for life in range(1, 4):
        wait_until(partial(has_begun, run_dir, life), 90)
        slurm.call("scancel", "--signal=USR1", job)
        wait_until(lambda: slurm.job(job)["JobState"] == "PENDING" or slurm.has_ended(job), 90)
    text = output.read_text()
    assert slurm.job(job)["ExitCode"] == "1:0", text
    assert "3 attempts in a row were stopped before their first step" in text
