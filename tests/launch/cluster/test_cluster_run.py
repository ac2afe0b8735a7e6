"""`shoestring cluster`: refusals, exit codes, and a training run over two machines that breaks and resumes."""

import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shoestring.launch.cluster import cluster_run
from shoestring.launch.cluster.cluster_run import SimulatedClusterRun, run_on_simulated_cluster
from shoestring.launch.compose import compose_run_config
from shoestring.launch.run.run_dir import read_run_status
from shoestring.tests.launch.machines import alive, descendants, needs_machines, wait_until
from shoestring.tests.launch.refusals import refused
from shoestring.tests.launch.small_run import small_run
from shoestring.tests.trainer.telemetry.written_events import step
from shoestring.trainer.ledger.summary import summarize_ledger
from shoestring.trainer.telemetry.history import read_all_metrics, read_metrics

STEPS, EVERY, BREAK = 18, 8, 12  # some steps after a save has begun, which takes two of them, and before the next
TWO_NODES = SimulatedClusterRun(["topology.ep=4"], None, fresh=False, nodes=2, gpus_per_node=2, uplink_rate="100mbit")

# A stand-in for a node's launcher: it writes step 5 of a run and then behaves as its argument says.
STAND_IN = f"""
import json, os, signal, sys, time
behavior = sys.argv[2 + int(os.environ["NODE_RANK"])]
print("I am", behavior, flush=True)
if behavior == "telling":
    open(sys.argv[1], "a").write(json.dumps(json.loads({step(5).to_json_line()!r}) | dict(time=time.time())) + "\\n")
if behavior.isdecimal():
    sys.exit(int(behavior))
signal.pause()
"""


def rehearse(monkeypatch: pytest.MonkeyPatch, run_dir: Path, *behaviors: str, faults: tuple[str, ...] = ()) -> int:
    """Run stand-ins, with short time limits for those that do not end."""
    run_dir.mkdir()
    overrides = [f"training.run_dir={run_dir}", "training.collective_timeout_seconds=1"]
    command = [sys.executable, "-I", "-S", "-c", STAND_IN, str(run_dir / "metrics.jsonl"), *behaviors]
    monkeypatch.setattr(SimulatedClusterRun, "node_command", lambda _: command)
    monkeypatch.setattr(SimulatedClusterRun, "compose_config", lambda _: compose_run_config(overrides))
    monkeypatch.setattr(cluster_run, "_SECONDS_FOR_OTHERS", 0.5)
    monkeypatch.setattr(cluster_run, "_SECONDS_AFTER_FAULT", 0)
    return run_on_simulated_cluster(replace(TWO_NODES, faults=[("--kill-node", text) for text in faults]))


def test_what_the_cluster_implies_is_added_where_it_is_not_given() -> None:
    own = ["topology.gpus_per_node=2", "training.device=cpu"]
    assert TWO_NODES.all_overrides() == ["topology.ep=4", *own]
    given = ["+topology.gpus_per_node=4", "training.device=auto", "telemetry.log_every=3"]
    assert replace(TWO_NODES, overrides=given, faults=[("--cut-link", "0@1")]).all_overrides() == given
    broken = replace(TWO_NODES, faults=[("--cut-link", "0@1")])
    assert broken.all_overrides() == ["topology.ep=4", *own, "telemetry.log_every=1"]
    assert broken.node_command()[1:3] == ["-m", "shoestring.launch.run.node"]
    assert replace(TWO_NODES, fresh=True, config_dir=Path("x")).node_command()[-3:] == ["--config-dir", "x", "--fresh"]


def test_what_is_refused() -> None:
    contrary = ["topology.ep=8", "topology.gpus_per_node=4", "training.device=auto", "telemetry.wandb.mode=online"]
    faults = [("--cut-link", "1"), ("--kill-node", "2@5"), ("--cut-link", "0@4"), ("--kill-node", "0@5")]
    found = refused(run_on_simulated_cluster, replace(TWO_NODES, overrides=contrary, uplink_rate="fast", faults=faults))
    assert "2 x 2 = 4 ranks, and the topology needs 8" in found["--gpus-per-node"]
    assert "--gpus-per-node is 2" in found["topology.gpus_per_node"]
    assert "write cpu" in found["training.device"]
    assert "no network access" in found["telemetry.wandb.mode"]
    assert "from 1mbit" in found["uplink"]
    assert "such as 0@20" in found["--cut-link"]
    assert "from 0 to 1" in found["--kill-node"]
    assert "one fault" in found["--cut-link, --kill-node"]


@needs_machines
@pytest.mark.parametrize(
    ("behaviors", "code", "shown"),
    [
        (("0", "0"), 0, False),
        (("3", "0"), 3, True),
        (("0", "3"), 3, True),
        (("waiting", "3"), 128 + signal.SIGTERM, True),
        (("3", "waiting"), 3, True),
    ],
)
def test_how_nodes_end(
    behaviors: tuple[str, str],
    code: int,
    shown: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert rehearse(monkeypatch, tmp_path / "run", *behaviors) == code
    output = capfd.readouterr()
    assert f"I am {behaviors[0]}\n" in output.out
    assert (f"node 1 | I am {behaviors[1]}\n" in output.err) == shown
    assert "uplink of each node (100mbit)" in output.out


@needs_machines
def test_a_fault_strikes_at_its_step_and_the_rest_ends_within_the_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert rehearse(monkeypatch, tmp_path / "run", "telling", "waiting", faults=("1@5",)) == 128 + signal.SIGTERM
    assert "killed at step 5" in capfd.readouterr().out


def command(verb: list[str], overrides: list[str], run_dir: Path) -> list[str]:
    return [sys.executable, "-m", "shoestring.launch.cli", *verb, "--", *overrides, f"training.run_dir={run_dir}"]


def cluster(overrides: list[str], run_dir: Path, *options: str) -> list[str]:
    return command(["cluster", "--nodes=2", "--gpus-per-node=2", "--uplink=200mbit", *options], overrides, run_dir)


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=240, check=False)


def losses(run_dir: Path) -> list[tuple[int, Any, Any]]:
    events = [event for event in read_metrics(run_dir / "metrics.jsonl") if event.kind == "step"]
    return [(event.step, event.values["loss"], event.values["grad_norm"]) for event in events]


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    own = ["topology.pp=1", "topology.ep=4", "exchange=two_hop", "schedule=1f1b"]
    own += ["training.collective_timeout_seconds=20", f"training.checkpoint_every={EVERY}", "telemetry.log_every=1"]
    return [*small_run(tmp_path_factory.mktemp("data"), STEPS), *own]


@pytest.fixture(scope="module")
def undisturbed(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of an undisturbed run over two nodes; its output is in `output` there."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run(cluster(overrides, run_dir))
    assert done.returncode == 0, done.stderr
    run_dir.with_name("output").write_text(done.stdout)
    return run_dir


@needs_machines
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_nodes_train_as_one_does(undisturbed: Path, overrides: list[str], tmp_path: Path) -> None:
    done = run(command(["train"], overrides, tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    on_one, on_two = losses(tmp_path / "run"), losses(undisturbed)
    assert [step for step, _, _ in on_two] == list(range(1, STEPS + 1))
    for one, two in zip(on_one, on_two, strict=True):
        assert two == pytest.approx(one, rel=1e-5)
    lines = undisturbed.with_name("output").read_text().splitlines()
    sent = [int(line.split()[2].replace(",", "")) for line in lines if line.startswith("  node ")]
    steps = [event for event in read_all_metrics(undisturbed / "metrics.jsonl") if event.kind == "step"]
    exchanged: Any = [event.values["all_to_all_bytes/infiniband"] for event in steps]
    assert min(exchanged) > 0
    assert min(sent) > sum(exchanged)  # of rank 0: tokens only; its node sends gradients too


@needs_machines
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("option", "node"), [("--cut-link", 1), ("--cut-link", 0), ("--kill-node", 1)])
def test_a_run_that_breaks_ends_and_resumes_from_its_checkpoint(
    option: str, node: int, undisturbed: Path, overrides: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    limit = "training.collective_timeout_seconds=8"
    broken = run(cluster([*overrides, limit], run_dir, f"{option}={node}@{BREAK}"))
    assert broken.returncode == 1, broken.stderr
    if option == "--cut-link":
        for ranks in ("[01]", "[23]"):  # nodes without a link to each other; the first to fail ends the other
            assert re.search(rf"rank {ranks}: .* with ranks .* \(limit 8 s\)", broken.stderr), broken.stderr
    assert f"{'killed' if option == '--kill-node' else 'link cut'} at step {BREAK}" in broken.stdout
    events = read_all_metrics(run_dir / "metrics.jsonl")
    assert not summarize_ledger(run_dir).is_running
    told = [event for event in events if event.kind == "step"]
    assert BREAK <= told[-1].step < STEPS

    again = run(cluster(overrides, run_dir))
    assert again.returncode == 0, again.stderr
    assert f"resume at step {EVERY}" in again.stdout
    assert losses(run_dir) == losses(undisturbed)
    assert read_run_status(run_dir) == {"exit_code": 0, "reason": f"{STEPS} steps done"}


@needs_machines
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_request_to_stop_ends_all_nodes_and_closes_the_ledger(overrides: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    endless = cluster([*overrides, "training.tokens=100000000"], run_dir)
    process = subprocess.Popen(endless, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step"):
            break
    processes = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT
    wait_until(lambda: not alive(processes), 20)
    assert not summarize_ledger(run_dir).is_running
