"""`shoestring train` as a user runs it: real torchrun, real kills."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from shoestring import __version__
from shoestring.launch.compose import compose_run_config
from shoestring.launch.report.run_record import read_run_record
from shoestring.launch.report.watch import watch
from shoestring.launch.run import signals
from shoestring.launch.run.run_dir import read_run_status
from shoestring.tests.launch.machines import alive
from shoestring.tests.launch.real_run import command, lines_as_they_come, processes_of, train, wait_until
from shoestring.tests.launch.report.recorded import report_of
from shoestring.tests.trainer.telemetry.offline_run import read_offline_run
from shoestring.trainer.checkpoint.store import CheckpointStore
from shoestring.trainer.data.preparation.prepare import prepare_corpus
from shoestring.trainer.ledger.summary import summarize_ledger
from shoestring.trainer.model.model import router_names
from shoestring.trainer.telemetry.dashboard import make_dashboard
from shoestring.trainer.telemetry.events import LossEvaluated
from shoestring.trainer.telemetry.history import read_all_metrics, read_metrics

STEPS = 8
SMALL = [
    "experiment=quickstart",
    "topology.pp=2",
    "topology.ep=1",
    "model.vocab_size=512",
    "data.vocab_size=512",
    "model.num_hidden_layers=4",
    "model.hidden_size=32",
    "training.sequence_length=32",
    "training.global_batch_size=8",
    f"training.tokens={STEPS * 8 * 32}",
    "training.evaluate_every=0",
    "training.checkpoint_every=3",
    "training.sample_tokens=4",
    "telemetry.log_every=1",
    "schedule.micro_batch_size=2",
    "optimizer.ema_decay=0.9",
    "budget.stop_at=null",
]


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the overrides of a small run, except its directory, on a corpus of two short files."""
    root = tmp_path_factory.mktemp("data")
    corpus = root / "corpus"
    corpus.mkdir()
    packaged = Path(compose_run_config(["experiment=quickstart"]).data.corpus_location)
    (corpus / "hamlet.txt").write_text((packaged / "hamlet.txt").read_text()[:20000])
    (corpus / "macbeth.txt").write_text((packaged / "macbeth.txt").read_text()[:1500])
    data = [f"data.corpus={corpus}", f"data.prepared={root / 'prepared'}", "data.validation=[macbeth]"]
    prepare_corpus(compose_run_config([*SMALL, *data]).data, lambda _: None)
    return [*SMALL, *data]


def history(run_dir: Path) -> list[dict[str, Any]]:
    """Return the values that must be equal to the last bit in two equal runs."""
    exact = [
        "loss",
        "loss/mtp",
        "loss/averaged",
        "loss/seq_aux",
        "grad_norm",
        "bias/min",
        "bias/max",
        "targets",
        "text",
        "tokens",
    ]
    exact += ["learning_rate", "load/max_violation", "tokens_per_expert/layer_01", "tokens_per_expert/mtp_01"]
    return [
        {"kind": event.kind, "step": event.step} | {key: event.values[key] for key in exact if key in event.values}
        for event in read_metrics(run_dir / "metrics.jsonl")
        if event.kind in ("step", "evaluation", "sample")
    ]


@pytest.fixture(scope="module")
def finished(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of an undisturbed run."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    result = train(overrides, run_dir)
    assert result.returncode == 0, result.stderr
    return run_dir


def test_the_files_of_a_run_hold_their_formats_and_the_version(finished: Path) -> None:
    directory = max((finished / "checkpoints").glob("step_*"))
    manifest = json.loads((directory / "manifest.json").read_text())
    assert (manifest["format"], manifest["metadata"]["version"]) == (4, __version__)
    for file in ("ledger/allocation.jsonl", "ledger/work.jsonl", "metrics.jsonl"):
        opening = json.loads((finished / file).read_text().splitlines()[0])
        assert (opening["format"], opening["version"]) == (2, __version__), file


def test_a_finished_run_has_everything(finished: Path) -> None:
    events = read_metrics(finished / "metrics.jsonl")
    assert str(events[0].values["attention"]).startswith("blocks (blocks of plain products")
    steps = [event for event in events if event.kind == "step"]
    assert [event.step for event in steps] == list(range(1, STEPS + 1))
    first: Any = steps[0].values
    last: Any = steps[-1].values
    assert first["loss"] == pytest.approx(6.24, abs=0.5)  # ln 512
    assert last["loss"] < first["loss"]
    wanted = {"loss/mtp", "loss/seq_aux", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "tflops", "mfu"}
    wanted |= {"load/max_violation", "load/layer_01/max_violation", "bias/min", "bias/max", "gpu_hours", "budget_share"}
    assert wanted <= last.keys()
    assert sum(last["tokens_per_expert/layer_01"]) == 8 * 32 * 4  # tokens of the batch times top-4
    (evaluation,) = (event for event in events if event.kind == "evaluation")
    validation_loss: Any = evaluation.values["loss"]
    assert 0 < validation_loss < 7
    assert {"sample", "checkpoint", "budget", "stop"} <= {event.kind for event in events}
    assert read_run_status(finished) == {"exit_code": 0, "reason": f"{STEPS} steps done"}
    summary = summarize_ledger(finished)
    assert sum(summary.gpu_ms_by_term.values()) == summary.productive_ms
    assert {"F", "pipeline_wait", "gradient_sync_wait", "optimizer"} <= {
        term for term, spent in summary.gpu_ms_by_term.items() if spent
    }
    assert summary.tokens_retained == summary.tokens_consumed == STEPS * 8 * 32
    assert 0 < summary.productive_ms < summary.allocated_ms
    assert not summary.is_running
    assert [path.name for path in sorted((finished / "checkpoints").iterdir())] == ["step_00000006", "step_00000008"]


def test_the_report_and_the_watcher_have_its_figures(finished: Path) -> None:
    evaluation, summary = read_run_record(finished).last_event(LossEvaluated), summarize_ledger(finished)
    assert evaluation is not None
    page = report_of(finished)
    assert f"validation loss {evaluation.loss:.3f} nats/token" in page.words()
    assert f"GPU-hours {summary.gpu_hours:.4f}" in page.words()
    assert f"time in the {STEPS} steps kept" in page.words("budget")
    assert "rank 1" in page.words("memory")
    assert "None: no warning" in page.words("incidents")
    console = Console(file=io.StringIO(), width=120)
    watch(finished, console)
    assert f"{STEPS} of {STEPS}" in console.file.getvalue()  # type: ignore[attr-defined]


def test_every_panel_of_the_dashboard_shows_what_is_logged(finished: Path) -> None:
    (path,) = (finished / "wandb").glob("offline-run-*/run-*.wandb")
    run = read_offline_run(path)
    logged = {key for row in run.history for key in row} | run.summary.keys()
    config = compose_run_config(SMALL)
    for section in make_dashboard(router_names(config.model)):
        for panel in section.panels:
            assert set(panel.metrics) <= logged


def test_wandb_holds_the_logged_history(finished: Path) -> None:
    (path,) = (finished / "wandb").glob("offline-run-*/run-*.wandb")
    rows = [row for row in read_offline_run(path).history if "loss" in row]
    steps = [event for event in read_all_metrics(finished / "metrics.jsonl") if event.kind == "step"]
    for key in ("loss", "loss/mtp", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "bias/max"):
        assert [row[key] for row in rows] == [event.values[key] for event in steps]
    assert [row["step"] for row in rows] == [event.step for event in steps]


def test_killed_and_started_again_it_ends_as_if_nothing_had_happened(
    finished: Path, overrides: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    process = subprocess.Popen(
        command(overrides, run_dir),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    saved = False
    for event in lines_as_they_come(run_dir / "metrics.jsonl", process):
        saved |= event["kind"] == "checkpoint"
        if saved and event["kind"] == "step":
            os.killpg(process.pid, signal.SIGKILL)  # some steps after the checkpoint of step 3
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert read_run_status(run_dir) is None
    assert CheckpointStore(run_dir / "checkpoints", 2).steps()[-1] == 3

    again = train(overrides, run_dir)
    assert again.returncode == 0, again.stderr
    assert "resume at step 3" in again.stdout
    assert history(run_dir) == history(finished)
    summary = summarize_ledger(run_dir)
    assert summary.num_attempts == 2
    assert summary.rolled_back_ms > 0
    assert summary.tokens_consumed > summary.tokens_retained == STEPS * 8 * 32
    assert len(list((run_dir / "wandb").glob("offline-run-*"))) == 2  # two attempts of one wandb run


def test_a_killed_launcher_leaves_no_rank_behind(overrides: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    many = "training.tokens=100000000"
    process = subprocess.Popen(
        command(overrides, run_dir, many), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for event in lines_as_they_come(run_dir / "metrics.jsonl", process):
        if event["kind"] == "step":
            process.kill()
    assert process.stdout is not None
    process.communicate(timeout=20)  # ends when the last holder of the pipe has exited
    assert process.returncode == -signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_a_launcher_killed_while_its_ranks_start_leaves_none_behind(overrides: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = subprocess.Popen(command(overrides, run_dir), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: len(processes_of(run_dir)) >= 4, 60)  # launcher, torchrun, two ranks
    started = set(processes_of(run_dir))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    wait_until(lambda: not alive(started), 20)
    assert not processes_of(run_dir)


def test_a_rank_whose_launcher_is_dead_ends_also_before_anyone_has_taken_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "die_with_parent", lambda: None)
    monkeypatch.setenv("RANK", "0")
    with subprocess.Popen(["sleep", "60"]) as launcher:
        monkeypatch.setenv(signals.LAUNCHER_PID_ENV_VAR, str(launcher.pid))
        signals.die_with_launcher()
        launcher.kill()
        os.waitid(os.P_PID, launcher.pid, os.WEXITED | os.WNOWAIT)  # dead, and still a zombie
        with pytest.raises(SystemExit):
            signals.die_with_launcher()
    with pytest.raises(SystemExit):
        signals.die_with_launcher()


def test_a_finished_run_is_left_alone(finished: Path, overrides: list[str]) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    again = train(overrides, finished)
    assert again.returncode == 0
    assert "is finished" in again.stdout
    assert (finished / "metrics.jsonl").read_bytes() == before


@pytest.mark.gpu
def test_the_quickstart_on_one_gpu(tmp_path: Path) -> None:
    overrides = ["experiment=quickstart", "topology=single", f"data.prepared={tmp_path / 'data'}"]
    overrides += ["training.tokens=20000", "telemetry.log_every=1"]
    config = compose_run_config(overrides)
    prepare_corpus(config.data, lambda _: None)
    result = train(overrides, tmp_path / "run")
    assert result.returncode == 0, result.stderr
    events = read_metrics(tmp_path / "run" / "metrics.jsonl")
    (run,) = (event.values for event in events if event.kind == "run")
    assert (run["ranks"], run["device"], run["compute_dtype"]) == (1, "cuda:0", "bfloat16")
    assert str(run["attention"]).startswith(("cudnn ", "flash3 ", "efficient "))
    losses: list[Any] = [event.values["loss"] for event in events if event.kind == "step"]
    assert len(losses) == config.total_steps
    assert losses[-1] < losses[0]


def test_a_loss_that_is_not_finite_stops_the_run_with_a_reason(overrides: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    extreme = ["optimizer.peak_learning_rate=1e30", "optimizer.final_learning_rate=1e30", "optimizer.warmup_tokens=0"]
    result = train(overrides, run_dir, *extreme)
    assert result.returncode == 1
    assert "not finite, so no weight was changed" in result.stderr
    assert "Lower optimizer.peak_learning_rate" in result.stderr
    status = read_run_status(run_dir)
    assert status is not None
    assert status["exit_code"] == 1
    summary = summarize_ledger(run_dir)
    assert summary.gpu_ms_by_bucket["skipped"] > 0
    assert summary.tokens_consumed == summary.tokens_retained + 8 * 32


def test_refusals_name_every_problem_and_leave_nothing_behind(overrides: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    result = train(overrides, run_dir, "model.hiden=3", "training.seed=many", "topology.ep=3")
    assert result.returncode == 2
    for gist in ("model.hiden", "did you mean hidden", "training.seed", "must be a whole number"):
        assert gist in result.stderr
    impossible = train(overrides, run_dir, "topology.ep=3", "training.global_batch_size=7")
    assert impossible.returncode == 2
    assert "topology.ep" in impossible.stderr
    assert "training.global_batch_size" in impossible.stderr
    assert not run_dir.exists()


def test_a_checkpoint_of_another_model_is_refused_before_anything_starts(finished: Path, overrides: list[str]) -> None:
    before = (finished / "config.yaml").read_bytes()
    result = train(overrides, finished, "model.num_attention_heads=2", "training.seed=1")
    assert result.returncode == 2
    assert "model.num_attention_heads = 2: the checkpoint of step 8 has 4" in result.stderr
    assert "training.seed = 1" in result.stderr
    assert (finished / "config.yaml").read_bytes() == before


def test_the_wrong_number_of_processes_is_refused_inside_torchrun(overrides: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    result = subprocess.run(
        [*torchrun, "-m", "shoestring.launch.cli", *command(overrides, run_dir)[3:]],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "topology needs 2 processes" in result.stderr
    assert not run_dir.exists()
