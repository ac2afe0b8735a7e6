"""wandb, offline: the events sent to the sink are read back from its file."""

import io
import os
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.tests.launch.machines import alive, wait_until
from shoestring.tests.trainer.telemetry.offline_run import OfflineRun, read_offline_run
from shoestring.tests.trainer.telemetry.written_events import EVALUATION, RUN
from shoestring.tests.trainer.telemetry.written_events import step as logged
from shoestring.trainer.telemetry.config import TelemetryConfig, WandbConfig
from shoestring.trainer.telemetry.events import (
    BudgetReported,
    Event,
    RunStopped,
    StepLogged,
    TextSampled,
    WarningRaised,
)
from shoestring.trainer.telemetry.history import read_all_metrics
from shoestring.trainer.telemetry.sinks import open_event_stream
from shoestring.trainer.telemetry.stream import EventStream
from shoestring.trainer.telemetry.wandb_sink import WandbSink, _run_id


@pytest.fixture(autouse=True)
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT", "WANDB_RUN_ID", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)


def offline_runs(run_dir: Path) -> list[OfflineRun]:
    return [read_offline_run(path) for path in sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))]


def own(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.startswith("_")}


def step(number: int) -> Event:
    return logged(number, 3.0 / number, mtp_loss=None, metrics={"load/layer_01/max_violation": 0.5})


def test_the_history_that_wandb_keeps_is_that_of_the_event_file(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    stream = EventStream(run_dir, [WandbSink(WandbConfig(project="tests"), run_dir, 0)])
    stream.emit(replace(RUN, config={"model": {"layers": 4}}, parameters=12))
    for number in range(1, 301):  # more than one block of 32 KiB
        stream.emit(step(number))
    stream.emit(replace(EVALUATION, step=300, loss=2.0))
    stream.emit(
        BudgetReported(
            step=300,
            metrics={"attempts": 2},
            gpu_hours=0.5,
            gpu_hours_per_trillion_tokens=None,
            published_gpu_hours_per_trillion_tokens=180_000,
            budget_share=0.5,
        )
    )
    stream.close()
    (run,) = offline_runs(run_dir)
    assert run.project == "tests"
    assert run.config["config"] == {"model": {"layers": 4}}
    assert run.config["parameters"] == 12
    assert (run.summary["budget/gpu_hours"], run.summary["budget/attempts"]) == (0.5, 2)
    recorded = [event for event in read_all_metrics(run_dir / "metrics.jsonl") if isinstance(event, StepLogged)]
    assert [own(row) for row in run.history[:-1]] == [{"step": event.step, **event.values} for event in recorded]
    assert own(run.history[-1]) == {
        "step": 300,
        "evaluation/loss": 2.0,
        "evaluation/targets": 4096,
        "evaluation/unigram_entropy": 5.8312,
    }
    (file,) = (run_dir / "wandb").glob("offline-run-*/*.wandb")
    assert file.stat().st_size > 2 * 32 * 1024


def service_of_wandb() -> int:
    """Return the process that wandb has started from this one."""
    for thread in Path("/proc/self/task").iterdir():
        for child in (thread / "children").read_text().split():
            if b"wandb-core" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
    raise AssertionError("wandb has no process")


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("last", ["an event", "the end"])
def test_nothing_is_lost_when_the_process_of_wandb_is_ended(last: str, tmp_path: Path) -> None:
    """Slurm's SIGTERM ends every process of a job, wandb's too; unwritten records are written again."""
    sink = WandbSink(WandbConfig(project="tests"), tmp_path, 0)
    sink.emit(replace(RUN, parameters=12))
    for number in range(1, 6):
        sink.emit(step(number))
    service = service_of_wandb()
    if last == "the end":
        sink.emit(RunStopped(step=6, reason="it was asked to"))
    os.kill(service, signal.SIGTERM)
    wait_until(lambda: not alive({service}), 20)
    if last == "an event":
        sink.emit(RunStopped(step=6, reason="it was asked to"))
    sink.close()
    runs = offline_runs(tmp_path)
    assert {run.run_id for run in runs if run.run_id} == {(tmp_path / "wandb_run_id").read_text().strip()}
    (whole,) = (run for run in runs if run.summary)
    assert [(row["_step"], row["step"]) for row in whole.history] == [(number + 1, number) for number in range(1, 6)]
    assert whole.config["parameters"] == 12
    assert whole.summary["stop/reason"] == "it was asked to"
    assert whole.alerts == (("stopped at step 6", "it was asked to"),)


def test_a_process_of_wandb_that_ends_each_time_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = []

    def gone(sink: WandbSink, *_: object) -> None:
        raise ConnectionResetError("Connection lost")

    def start(sink: WandbSink) -> None:
        starts.append(sink)

    monkeypatch.setattr(WandbSink, "_open", start)
    monkeypatch.setattr(WandbSink, "_send", gone)
    sink = WandbSink(WandbConfig(), tmp_path, 0)
    with pytest.raises(ConnectionResetError, match="Connection lost"):
        sink.emit(step(1))
    assert len(starts) == 3


def test_a_process_of_wandb_that_ends_while_it_starts_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = []

    def start(sink: WandbSink) -> None:
        starts.append(sink)
        if len(starts) < starts_needed:
            raise ConnectionResetError("Connection lost")

    monkeypatch.setattr(WandbSink, "_open", start)
    starts_needed = 3
    WandbSink(WandbConfig(), tmp_path, 0)
    assert len(starts) == 3
    starts_needed = 9
    with pytest.raises(ConfigError, match="wandb could not start"):
        WandbSink(WandbConfig(), tmp_path, 0)
    assert len(starts) == 6


def test_a_second_attempt_has_the_same_id_and_continues_counting(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for start in (1, 3):
        stream = EventStream(run_dir, [])
        sink = WandbSink(WandbConfig(), run_dir, 0 if start == 1 else 3)
        for event in (step(start), step(start + 1), step(start + 2)):
            stream.emit(event)
            sink.emit(event)
        sink.close()
        stream.close()
    first, second = offline_runs(run_dir)
    assert first.run_id == second.run_id == (run_dir / "wandb_run_id").read_text().strip()
    steps = [(row["_step"], row["step"]) for row in (*first.history, *second.history)]
    assert steps == [(1, 1), (2, 2), (3, 3), (4, 3), (5, 4), (6, 5)]


def test_expert_loads_become_one_bar_an_expert(tmp_path: Path) -> None:
    sink = WandbSink(WandbConfig(), tmp_path, 0)
    loads = {"tokens_per_expert/layer_01": [4, 0, 8], "tokens_per_expert/layer_02": [1] * 1000}
    sink.emit(logged(1, metrics=loads))
    sink.emit(TextSampled(step=1, text="<to be>"))
    sink.close()
    (run,) = offline_runs(tmp_path)
    assert run.history[0]["tokens_per_expert/layer_01"] == {
        "_type": "histogram",
        "values": [4, 0, 8],
        "bins": [0, 1, 2, 3],
    }
    assert run.history[0]["tokens_per_expert/layer_02"]["values"] == [2] * 500
    assert run.history[1]["sample/text"]["_type"] == "html-file"
    (page,) = (tmp_path / "wandb").glob("offline-run-*/files/media/html/**/*.html")
    assert page.read_text() == "<pre>&lt;to be&gt;</pre>"


def test_online_without_an_account_is_one_clear_refusal(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refusal:
        WandbSink(WandbConfig(mode="online"), tmp_path, 0)
    (problem,) = refusal.value.problems
    assert problem.field == "telemetry.wandb"
    assert "wandb login" in problem.hint


@pytest.mark.slow
def test_online_with_a_server_that_is_gone_the_run_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:  # which never answers
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        stream = open_event_stream(TelemetryConfig(wandb=WandbConfig(mode="online")), tmp_path, io.StringIO())
        start = time.perf_counter()
        for number in range(1, 101):
            stream.emit(step(number))
        assert time.perf_counter() - start < 1
        stream.close()
    events = read_all_metrics(tmp_path / "metrics.jsonl")
    assert [event.kind for event in events] == [*["step"] * 100, "warning"]
    assert "wandb could not start" in str(events[-1].values["message"])


def test_troubles_become_alerts(tmp_path: Path) -> None:
    stream = open_event_stream(TelemetryConfig(), tmp_path, io.StringIO())
    stream.emit(step(1))
    stream.emit(WarningRaised(step=1, about="spike", message="the loss has jumped"))
    stream.emit(RunStopped(step=2, reason="rank 3 is gone"))
    stream.close()
    (run,) = offline_runs(tmp_path)
    assert run.alerts == (("spike at step 1", "the loss has jumped"), ("stopped at step 2", "rank 3 is gone"))
    stream = open_event_stream(TelemetryConfig(), tmp_path, io.StringIO())
    stream.emit(RunStopped(step=2, reason="done"))
    stream.close()
    assert not offline_runs(tmp_path)[1].alerts


def test_disabled_leaves_no_trace(tmp_path: Path) -> None:
    terminal = io.StringIO()
    stream = open_event_stream(TelemetryConfig(wandb=WandbConfig(mode="disabled")), tmp_path, terminal)
    stream.emit(RunStopped(step=1, reason="done"))
    stream.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert terminal.getvalue() == "finished at step 1\n"


def test_a_damaged_file_is_refused_and_a_torn_one_read_to_its_end(tmp_path: Path) -> None:
    sink = WandbSink(WandbConfig(), tmp_path, 0)
    for number in range(1, 4):
        sink.emit(step(number))
    sink.close()
    (path,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    data = path.read_bytes()
    place = data.index(b"max_violation")
    (tmp_path / "damaged").write_bytes(data[:place] + b"M" + data[place + 1 :])
    with pytest.raises(ConfigError, match="CRC"):
        read_offline_run(tmp_path / "damaged")
    for cut in range(7, len(data), 31):
        (tmp_path / "torn").write_bytes(data[:cut])
        assert len(read_offline_run(tmp_path / "torn").history) <= 3
    (tmp_path / "other").write_bytes(b"something else")
    with pytest.raises(ConfigError, match="version 0"):
        read_offline_run(tmp_path / "other")


@pytest.mark.parametrize("left", [b"", b"\xff\xfe\x00\x01", b"x" * 5000, b"../../etc/passwd"])
def test_an_id_that_is_torn_gives_a_new_one(tmp_path: Path, left: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wandb_run_id").write_bytes(left)
    found = _run_id(tmp_path)
    assert found == _run_id(tmp_path) == (tmp_path / "wandb_run_id").read_text().strip()
    assert len(found) == 8
    assert "holds no wandb run ID" in capsys.readouterr().err


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "wandb").write_text("notes")
    with pytest.raises(ConfigError) as refusal:
        WandbSink(WandbConfig(), tmp_path, 0)
    (problem,) = refusal.value.problems
    assert problem.value == "offline"
    assert f"{tmp_path / 'wandb'}, is none: remove it, or set telemetry.wandb.mode to disabled" in problem.hint
    assert "login" not in problem.hint
    assert (tmp_path / "wandb").read_text() == "notes"
