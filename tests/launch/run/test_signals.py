"""Runs that stop before their end, through real torchrun: exit code 75 when asked to, 3 when the budget is used up."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from shoestring.launch.compose import compose_run_config
from shoestring.launch.run import launcher
from shoestring.launch.run.launcher import StoppedBySignal, raise_on_stop_signals, request_stop_on_signal
from shoestring.launch.run.run_dir import read_run_status
from shoestring.launch.run.signals import STOP_FILE_ENV_VAR, StoppedBeforeStart
from shoestring.tests.launch.real_run import (
    command,
    processes_of,
    ranks_of,
    torchrun_of,
    train,
    wait_for_step,
    wait_until,
)
from shoestring.tests.launch.small_run import BATCH, SEQUENCE, small_run
from shoestring.trainer.ledger.budget_guard import MIN_STEPS_TO_PROJECT
from shoestring.trainer.ledger.summary import LedgerSummary, summarize_ledger
from shoestring.trainer.telemetry.history import read_metrics

ENDLESS = "training.tokens=1e9"
Start = Callable[[list[str], Path], subprocess.Popen[str]]


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    own = ["telemetry.log_every=1", "training.checkpoint_every=0", "telemetry.wandb.mode=disabled"]
    return [*small_run(tmp_path_factory.mktemp("data"), steps=1), *own]


@pytest.fixture
def start() -> Iterator[Start]:
    """Return a function that starts an endless run and waits for its second step. None outlives the test."""
    with ExitStack() as cleanup:

        def begin(arguments: list[str], run_dir: Path) -> subprocess.Popen[str]:
            process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            cleanup.enter_context(process)
            cleanup.callback(process.kill)
            wait_for_step(run_dir, process, 2)
            return process

        yield begin


def endless(overrides: list[str], run_dir: Path, *more: str) -> tuple[list[str], Path]:
    return command(overrides, run_dir, ENDLESS, *more), run_dir


def checkpoints(run_dir: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in sorted((run_dir / "checkpoints").iterdir())]


def closed_ledger(run_dir: Path) -> LedgerSummary:
    """Return the ledger's summary, checked: `summarize_ledger` refuses a ledger whose parts do not add up."""
    summary = summarize_ledger(run_dir)
    assert not summary.is_running
    assert summary.unattributed_ms >= 0
    return summary


def assert_halted(run_dir: Path, process: subprocess.Popen[str]) -> int:
    """Check exit code 75; return the number of the last step, which is in the only checkpoint."""
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert not processes_of(run_dir)
    (done,) = checkpoints(run_dir)
    assert f"stopped after step {done}, which is in a checkpoint: a stop was requested" in said
    status = read_run_status(run_dir)
    assert status is not None
    assert status["exit_code"] == 75
    summary = closed_ledger(run_dir)
    assert summary.steps_retained == done
    assert summary.gpu_ms_by_bucket["checkpoint_save"] > 0
    return done


def test_a_run_that_is_asked_to_stop_ends_its_step_and_exits_with_75(
    start: Start, overrides: list[str], tmp_path: Path
) -> None:
    process = start(*endless(overrides, tmp_path / "run"))
    process.terminate()
    assert_halted(tmp_path / "run", process)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("who", "number"),
    [
        ("launcher", signal.SIGUSR1),
        ("launcher", signal.SIGQUIT),
        ("all", signal.SIGHUP),
        ("torchrun", signal.SIGTERM),
        ("a rank", signal.SIGTERM),
        ("all", signal.SIGTERM),
        ("all", signal.SIGUSR1),
    ],
)
def test_whichever_process_gets_the_signal_the_run_resumes_later(
    who: str, number: signal.Signals, start: Start, overrides: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    process = start(*endless(overrides, run_dir, "telemetry.wandb.mode=offline"))
    ranks, torchrun = ranks_of(run_dir), torchrun_of(run_dir)
    assert len(ranks) == 2
    targets = {"launcher": [process.pid], "torchrun": [torchrun], "a rank": ranks[1:]}
    for pid in targets.get(who, [torchrun, *ranks, process.pid]):  # as Slurm does it
        os.kill(pid, number)
    done = assert_halted(run_dir, process)
    again = train(overrides, run_dir, f"training.tokens={(done + 1) * BATCH * SEQUENCE}")
    assert again.returncode == 0, again.stderr
    assert [event.step for event in read_metrics(run_dir / "metrics.jsonl") if event.kind == "step"] == [
        *range(1, done + 2)
    ]
    assert closed_ledger(run_dir).rolled_back_ms == 0


@pytest.mark.parametrize("seconds", [1, pytest.param(300, marks=pytest.mark.slow)], ids=["time is up", "asked again"])
def test_a_run_that_does_not_come_to_the_end_of_a_step_is_ended(
    seconds: int, start: Start, overrides: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    process = start(*endless(overrides, run_dir, f"training.stop_seconds={seconds}"))
    first, second = ranks_of(run_dir)
    os.kill(second, signal.SIGSTOP)  # the other waits for it in the middle of a step
    process.terminate()
    if seconds > 1:
        assert process.stderr is not None
        assert "a second SIGTERM stops immediately" in process.stderr.readline()

    def has_been_ended() -> bool:
        if seconds > 1:
            process.terminate()  # the first signals count as one request
        return first not in processes_of(run_dir)

    wait_until(has_been_ended, 20)
    os.kill(second, signal.SIGCONT)  # a later signal ends it, before torchrun's 30 seconds are over
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert not processes_of(run_dir)
    assert read_run_status(run_dir) is None
    assert not (run_dir / "checkpoints").exists()
    closed_ledger(run_dir)


def test_ctrl_c_stops_immediately(start: Start, overrides: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start(*endless(overrides, run_dir))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert not processes_of(run_dir)
    assert not (run_dir / "checkpoints").exists()
    closed_ledger(run_dir)


@pytest.mark.parametrize("again", [True, False])
def test_the_first_signal_asks_and_a_later_one_or_the_time_ends(
    again: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    former = signal.getsignal(signal.SIGTERM)
    with request_stop_on_signal(tmp_path / "stop", 60 if again else 0.5) as raise_if_stop_failed:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):  # one request, sent three times
            signal.raise_signal(number)
        assert (tmp_path / "stop").exists()
        monkeypatch.setattr(launcher, "STOP_DEBOUNCE_SECONDS", 0)
        signal.raise_signal(signal.SIGUSR1)
        with pytest.raises(StoppedBySignal) as caught:
            wait_for_the_end(again)
        assert caught.value.exit_code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == former
    raise_if_stop_failed(0)
    with pytest.raises(StoppedBySignal, match="SIGTERM"):
        raise_if_stop_failed(1)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1])
def test_every_asking_signal_asks(number: signal.Signals, tmp_path: Path) -> None:
    former = signal.signal(number, signal.SIG_DFL)  # under nohup the tests themselves ignore SIGHUP
    try:
        with request_stop_on_signal(tmp_path / "stop", 60):
            signal.raise_signal(number)
            assert (tmp_path / "stop").exists()
    finally:
        signal.signal(number, former)


def test_under_nohup_the_end_of_a_terminal_means_nothing(tmp_path: Path) -> None:
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with raise_on_stop_signals(), request_stop_on_signal(tmp_path / "stop", 60):
            signal.raise_signal(signal.SIGHUP)
        assert not (tmp_path / "stop").exists()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)


def test_a_rank_hears_what_came_before_it_listened() -> None:
    code = (
        "from shoestring.launch.run.signals import install_stop_handlers as l; import signal; signal.raise_signal(15); "
    )
    code += "raise SystemExit(0 if l(60)() else 1)"
    with subprocess.Popen([sys.executable, "-c", code], preexec_fn=launcher._prepare_torchrun_process) as rank:
        assert rank.wait(60) == 0


@pytest.mark.parametrize(("seconds", "again"), [(60, signal.SIGTERM), (60, signal.SIGQUIT), (0.1, None)])
def test_a_rank_without_a_launcher_ends(seconds: float, again: signal.Signals | None) -> None:
    """It also ends while its main thread waits outside Python, as for messages that never come."""
    code = "import signal; from shoestring.launch.run import signals as s; s.STOP_DEBOUNCE_SECONDS = 0; "
    code += (
        f"s.install_stop_handlers({seconds}); signal.raise_signal(10); print('asked', flush=True); signal.sigwait([12])"
    )
    outside = {name: value for name, value in os.environ.items() if name != STOP_FILE_ENV_VAR}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=outside, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as rank:
        try:
            assert rank.stdout is not None
            assert rank.stderr is not None
            assert rank.stdout.readline() == "asked\n"
            if again is not None:
                rank.send_signal(again)
            assert rank.wait(30) == 128 + (again or signal.SIGUSR1)
            assert ("second stop signal" if again else "still running 0.1 s") in rank.stderr.read()
        finally:
            rank.kill()


def test_nothing_cuts_short_what_a_launcher_does_after_it_was_stopped() -> None:
    former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with pytest.raises(StoppedBySignal, match="SIGTERM"), raise_on_stop_signals():
            signal.raise_signal(signal.SIGTERM)
        for number in former:
            signal.raise_signal(number)  # either would end this process
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def wait_for_the_end(again: bool) -> None:
    if again:
        signal.raise_signal(signal.SIGTERM)
    threading.Event().wait(60)


def own_torchrun(overrides: list[str], run_dir: Path, *options: str) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options]
    return [*torchrun, *command(overrides, run_dir, ENDLESS)[1:]]


@pytest.mark.slow
def test_under_a_users_torchrun_with_restarts(start: Start, overrides: list[str], tmp_path: Path) -> None:
    """torchrun's exit code says nothing; the run's status does. A rank that stops on purpose is not restarted."""
    run_dir = tmp_path / "run"
    process = start(own_torchrun(overrides, run_dir, "--max-restarts=3"), run_dir)
    os.kill(ranks_of(run_dir)[0], signal.SIGUSR1)
    process.communicate(timeout=60)
    assert process.returncode == 1  # torchrun's code: a rank has exited with 75
    (done,) = checkpoints(run_dir)
    assert [event.kind for event in read_metrics(run_dir / "metrics.jsonl")].count("run") == 1
    status = read_run_status(run_dir)
    assert status is not None
    assert (status["exit_code"], summarize_ledger(run_dir).steps_retained) == (75, done)


def test_a_run_without_budget_left_trains_no_step(overrides: list[str], tmp_path: Path) -> None:
    run_dir, poor = tmp_path / "run", "budget.gpu_hours=1e-7"
    first = train(overrides, run_dir, ENDLESS, poor)
    assert first.returncode == 3, first.stderr
    assert "stopped before the first step: the run has used " in first.stderr
    assert "its budget is 1e-07; raise budget.gpu_hours to continue" in first.stderr
    before = contents(run_dir)
    again = train(overrides, run_dir, ENDLESS, poor)
    assert again.returncode == 3
    assert "raise budget.gpu_hours to continue" in again.stderr
    assert again.stdout == ""  # no rank was started
    assert contents(run_dir) == before
    assert closed_ledger(run_dir).steps_retained == 0


def contents(run_dir: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_budget_that_is_used_up_in_the_middle_is_raised(overrides: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    price = measured_price(overrides, tmp_path / "other")
    first = train(overrides, run_dir, ENDLESS, f"budget.gpu_hours={4 * price}")
    assert first.returncode == 3, first.stderr
    (done,) = checkpoints(run_dir)
    assert f"stopped after step {done}, which is in a checkpoint: the run has used " in first.stderr
    summary = closed_ledger(run_dir)
    assert summary.steps_retained == done
    assert summary.budget_share >= 1
    last = f"training.tokens={(done + 2) * BATCH * SEQUENCE}"
    again = train(overrides, run_dir, last, f"budget.gpu_hours={4 * price}")
    assert (again.returncode, again.stdout) == (3, "")
    richer = train(overrides, run_dir, last, f"budget.gpu_hours={40 * price}")
    assert richer.returncode == 0, richer.stderr
    assert closed_ledger(run_dir).steps_retained == done + 2


def test_a_run_that_would_pass_its_budget_is_stopped_long_before(overrides: list[str], tmp_path: Path) -> None:
    run_dir, guarded = tmp_path / "run", "budget.stop_at=1"
    first = train(overrides, run_dir, ENDLESS, guarded)
    assert first.returncode == 3, first.stderr
    (done,) = checkpoints(run_dir)
    assert done == MIN_STEPS_TO_PROJECT + 1  # a step is voted on before its own cost is known
    assert f"stopped after step {done}, which is in a checkpoint: the run has used " in first.stderr
    assert "and is projected to use " in first.stderr
    assert "budget.stop_at=null" in first.stderr
    assert closed_ledger(run_dir).budget_share < 0.5
    again = train(overrides, run_dir, ENDLESS, guarded)
    assert (again.returncode, again.stdout) == (3, "")  # no rank was started


def measured_price(overrides: list[str], run_dir: Path) -> float:
    """Return the GPU-hours of a run of one step on this machine: nearly all of it is start-up."""
    assert train(overrides, run_dir).returncode == 0
    return summarize_ledger(run_dir).gpu_hours


def test_a_stop_between_two_handlers_of_a_launcher_is_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def signaled(*arguments: object) -> int:
        raise StoppedBeforeStart("stopped by SIGUSR1 before it began; nothing was trained")

    monkeypatch.setattr(launcher, "run_torchrun", signaled)
    config = compose_run_config([*small_run(tmp_path, 1), f"training.run_dir={tmp_path / 'run'}"])
    codes = [launcher.launch_run(config, launcher.LocalRanks(2, ()), fresh=False) for _ in range(3)]
    assert codes == [75, 75, 1]
    assert "3 attempts in a row were stopped before their first step" in capsys.readouterr().err
    assert not summarize_ledger(tmp_path / "run").is_running
