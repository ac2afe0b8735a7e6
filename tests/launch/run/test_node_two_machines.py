"""Two launch/torchrun.sh: machines that end, that differ, that never come. Losses stay equal.

Each is a session of its own, as a machine is: what is sent to one does not reach the other.
"""

import os
import signal
from functools import partial
from pathlib import Path

import pytest

from shoestring.launch.run.run_dir import read_run_status
from shoestring.tests.launch.real_run import wait_until
from shoestring.tests.launch.small_run import small_run
from shoestring.tests.launch.two_machines import ONE_RANK_EACH, Launch, launch, losses, saved_steps
from shoestring.trainer.ledger.summary import summarize_ledger
from shoestring.trainer.telemetry.history import read_metrics

STEPS = 40
LAUNCHER, TORCHRUN, RANK = 0, 1, 2
NEVER = "training.rendezvous_timeout_seconds=1"


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    own = ["telemetry.log_every=1", "training.checkpoint_every=0", "telemetry.wandb.mode=disabled"]
    return [*small_run(tmp_path_factory.mktemp("data"), STEPS), *own]


@pytest.fixture(scope="module")
def undisturbed(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a run of two machines; machine 0 resolves `${now:}` for both."""
    runs = tmp_path_factory.mktemp("runs")
    with launch(tmp_path_factory.mktemp("undisturbed")) as both:
        both.start_both([*overrides, f"training.run_dir={runs}/${{now:%S.%f}}"])
        assert both.codes() == [0, 0], both.everything()
    (run_dir,) = runs.iterdir()
    return run_dir


def test_two_machines_are_one_run(undisturbed: Path) -> None:
    assert read_run_status(undisturbed) == {"exit_code": 0, "reason": f"{STEPS} steps done"}
    assert [step for step, _, _ in losses(undisturbed)] == list(range(1, STEPS + 1))
    assert [event.step for event in read_metrics(undisturbed / "metrics.jsonl") if event.kind == "stop"] == [STEPS]
    assert not summarize_ledger(undisturbed).is_running


def send(machine: int, members: tuple[int, ...], number: signal.Signals, both: Launch) -> None:
    processes = both.processes(machine)
    for member in members:
        os.kill(processes[member], number)


STOPS = {
    "TERM to launcher and torchrun of machine 1": partial(send, 1, (LAUNCHER, TORCHRUN), signal.SIGTERM),
    "TERM to launcher and torchrun of machine 0": partial(send, 0, (LAUNCHER, TORCHRUN), signal.SIGTERM),
    "TERM to all of machine 1": partial(send, 1, (LAUNCHER, TORCHRUN, RANK), signal.SIGTERM),
    "HUP to machine 1": partial(send, 1, (LAUNCHER,), signal.SIGHUP),
    "TERM to torchrun of machine 1": partial(send, 1, (TORCHRUN,), signal.SIGTERM),
    "TERM to a rank of machine 1": partial(send, 1, (RANK,), signal.SIGTERM),
}
FAULTS = {
    "KILL of torchrun of machine 1": partial(send, 1, (TORCHRUN,), signal.SIGKILL),
    "KILL of torchrun of machine 0": partial(send, 0, (TORCHRUN,), signal.SIGKILL),
    "KILL of a rank of machine 1": partial(send, 1, (RANK,), signal.SIGKILL),
    "KILL of the launcher of machine 1": partial(send, 1, (LAUNCHER,), signal.SIGKILL),
    "KILL of the launcher of machine 0": partial(send, 0, (LAUNCHER,), signal.SIGKILL),
    "INT to machine 1": partial(send, 1, (LAUNCHER,), signal.SIGINT),
}


def resume(overrides: list[str], run_dir: Path, folder: Path, undisturbed: Path) -> None:
    """Run the same command once more: it ends, and every loss equals the undisturbed run's."""
    with launch(folder) as again:
        again.start_both([*overrides, f"training.run_dir={run_dir}"])
        assert again.codes() == [0, 0], again.everything()
    assert losses(run_dir) == losses(undisturbed)


@pytest.mark.parametrize(
    "how", [name if name is next(iter(STOPS)) else pytest.param(name, marks=pytest.mark.slow) for name in STOPS]
)
def test_a_machine_that_is_asked_to_stop_ends_both_within_seconds_and_loses_no_step(
    how: str, overrides: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    """torchrun of machine 0 would wait five minutes for the torchrun of machine 1."""
    run_dir = tmp_path / "run"
    with launch(tmp_path / "first") as both:
        both.start_both([*overrides, f"training.run_dir={run_dir}"])
        both.wait_for_step(run_dir, 3)
        STOPS[how](both)
        assert both.codes(30) == [75, 75], both.everything()
        for machine in (0, 1):
            lines = both.said(machine).splitlines()
            assert "which is in a checkpoint: a stop was requested" in lines[-1]
            assert "Traceback" not in both.said(machine)
    (done,) = saved_steps(run_dir)
    assert [step for step, _, _ in losses(run_dir)] == list(range(1, done + 1))
    resume(overrides, run_dir, tmp_path / "again", undisturbed)
    assert summarize_ledger(run_dir).rolled_back_ms == 0


@pytest.mark.slow
@pytest.mark.parametrize("how", FAULTS)
def test_a_machine_that_fails_ends_both_and_the_run_resumes(
    how: str, overrides: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    run_dir, saving = tmp_path / "run", "training.checkpoint_every=2"
    with launch(tmp_path / "first") as both:
        both.start_both([*overrides, saving, f"training.run_dir={run_dir}"])
        both.wait_for_step(run_dir, 5)
        FAULTS[how](both)
        codes = both.codes(30)
        assert codes in ([1, 1], [1, 130], [-9, 1], [1, -9]), both.everything()
        for machine in (0, 1):
            if codes[machine] > 0:
                assert both.said(machine).splitlines()[-1].startswith("shoestring train: ")
            assert "Traceback" not in both.said(machine)
    resume([*overrides, saving], run_dir, tmp_path / "again", undisturbed)


def refused_alike(
    both: Launch, overrides: list[str], own: dict[int, list[str]], variables: dict[int, dict[str, str]]
) -> str:
    """Return the output of two launchers that refuse to start, each with its overrides and variables."""
    for machine in (0, 1):
        both.start(
            machine, [*overrides, ONE_RANK_EACH, *own.get(machine, [])], both.folder, **variables.get(machine, {})
        )
    assert both.codes() == [2, 2], both.everything()
    return both.said(0)


@pytest.mark.parametrize(
    ("own", "variables", "words"),
    [
        pytest.param({1: ["training.seed=7"]}, {}, "training.seed = '0 on node 0 (", id="seed"),
        pytest.param(
            {machine: ["training.sample_prompt=${oc.env:PROMPT}"] for machine in (0, 1)},
            {0: {"PROMPT": "mine"}, 1: {"PROMPT": "yours"}},
            "(environment variables differ)",
            id="environment",
        ),
        pytest.param({1: ["model.expert_fnf=40"]}, {}, "reported an error: model.expert_fnf = 40", id="typo"),
        *(
            pytest.param({1: [key]}, {}, f"{key.partition('=')[0]} = '", id=key, marks=pytest.mark.slow)
            for key in (
                "model.moe_intermediate_size=40",
                "optimizer.peak_learning_rate=2e-3",
                "training.collective_timeout_seconds=9",
            )
        ),
    ],
)
def test_machines_that_differ_are_refused_by_both(
    own: dict[int, list[str]], variables: dict[int, dict[str, str]], words: str, overrides: list[str], tmp_path: Path
) -> None:
    with launch(tmp_path / "launch") as both:
        said = refused_alike(both, [*overrides, f"training.run_dir={tmp_path / 'run'}"], own, variables)
    assert words in said
    assert "yours" not in said


def test_a_machine_that_never_comes_is_named_early_and_waited_for_up_to_a_limit(
    overrides: list[str], tmp_path: Path
) -> None:
    """Machine 1 gets another address, where nothing listens."""
    with launch(tmp_path / "launch") as both:
        run = [*overrides, NEVER, ONE_RANK_EACH, f"training.run_dir={tmp_path / 'run'}"]
        both.start(0, run)
        both.start(1, run, MASTER_ADDR="127.0.0.77")
        assert both.codes() == [1, 1], both.everything()
        first, last = both.said(0).splitlines()
        assert "waiting for 1 of 2 nodes at 127.0.0.1:" in first
        assert "1 of 2 nodes did not connect to 127.0.0.1:" in last
        first, last = both.said(1).splitlines()
        assert "waiting for node 0 at 127.0.0.77:" in first
        assert "node 0 did not listen at 127.0.0.77:" in last
    assert not summarize_ledger(tmp_path / "run").is_running


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("no-such-machine.invalid", "does not resolve on this machine"),
        pytest.param("127.0.0.1:29500", "write MASTER_ADDR=127.0.0.1 and MASTER_PORT=29500", marks=pytest.mark.slow),
    ],
)
def test_an_address_that_does_not_resolve_is_refused_before_anything_is_waited_for(
    address: str, words: str, overrides: list[str], tmp_path: Path
) -> None:
    with launch(tmp_path / "launch") as both:
        run = [*overrides, ONE_RANK_EACH, f"training.run_dir={tmp_path / 'run'}"]
        both.start(1, run, MASTER_ADDR=address)
        assert both.codes() == [2]
        assert f"MASTER_ADDR = '{address}': " in both.said(1)
        assert words in both.said(1)
        assert "waiting" not in both.said(1)


def test_a_directory_of_one_machine_is_refused_by_both(overrides: list[str], tmp_path: Path) -> None:
    with launch(tmp_path / "launch") as both:
        for machine, name in enumerate(("here", "there")):
            (tmp_path / name).mkdir()
            both.start(machine, [*overrides, ONE_RANK_EACH, "training.run_dir=run"], tmp_path / name)
        assert both.codes() == [2, 2], both.everything()
        assert all("training.run_dir = 'run': is not shared: node 1" in both.said(machine) for machine in (0, 1))


def test_a_machine_that_waits_for_others_stops_immediately(overrides: list[str], tmp_path: Path) -> None:
    with launch(tmp_path / "launch") as both:
        both.start(0, [*overrides, ONE_RANK_EACH, f"training.run_dir={tmp_path / 'run'}"])
        wait_until(lambda: "waiting for 1 of 2 nodes at 127.0.0.1:" in both.said(0), 60)
        both.machines[0].terminate()
        assert both.codes(2) == [75]
        assert "stopped by SIGTERM before all nodes had connected" in both.said(0)
    assert not summarize_ledger(tmp_path / "run").is_running
