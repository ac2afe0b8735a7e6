"""`shoestring report`: one page that loads nothing, has the run's figures, and says what was not recorded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.launch.cli import main
from shoestring.launch.report.page import html_report
from shoestring.launch.report.record import read_run
from shoestring.launch.report.schedule import last_step, mean_times
from shoestring.launch.run.run_dir import own
from shoestring.tests.launch.report.reader import Reader
from shoestring.tests.launch.report.recorded import LAST, STEPS, config, program, record_run, record_trace, step
from shoestring.trainer.ledger.summary import summarize
from shoestring.trainer.telemetry.events import Event, EventStream
from shoestring.trainer.telemetry.trace import read_trace

SECTIONS = ["", "loss", "budget", "schedule", "experts", "memory", "incidents", "configuration"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recorded") / "my run & <i>"
    record_run(path)
    record_trace(path)
    return path


@pytest.fixture(scope="module")
def html(run_dir: Path) -> str:
    return html_report(read_run(run_dir))


@pytest.fixture(scope="module")
def page(html: str) -> Reader:
    return Reader(html)


def report_of(run_dir: Path) -> Reader:
    return Reader(html_report(read_run(run_dir)))


def shoestring(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    code: int = ended.value.code  # type: ignore[assignment]
    return code


def test_the_page_loads_nothing(html: str, page: Reader) -> None:
    assert page.loaded
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in page.loaded)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    assert "@import" not in html
    assert set(re.findall(r"https?://[^\"'\s<]*", html)) <= {"http://www.w3.org/2000/svg"}  # a name, not an address


def test_every_section_is_there_and_words_of_the_run_stay_words(page: Reader) -> None:
    assert list(page.text) == SECTIONS
    assert "my run & <i>" in page.words()
    assert "Speak, hands & <b>feet</b>" in page.words("loss")
    assert "the loss <script>alert(1)</script> jumped" in page.words("incidents")


def test_the_headline(run_dir: Path, page: Reader) -> None:
    summary = summarize(run_dir)
    assert summary.gpu_hours == pytest.approx((10 * 324 + 360) * 2 / 3600)  # eight steps, two done twice, evaluation
    for words in (
        "done",
        "validation loss 4.500 nats a token step 8; unigram entropy 5.830",
        "tokens retained 8.0k of 400.0k asked for; 2.0k undone or skipped",
        "GPU-hours 2.0000 50.0 % of its budget of 4.0000",
        "GPU-hours a trillion retained tokens 250,000,000 DeepSeek-V3: 180,000",
        "goodput 72.0 %",
        "MFU 25.0 % median; 2.0k tokens a second",
        "3.5M parameters, 1.7M active a token",
        "pp 2, edp 1, ep 2; dualpipev; exchange flat",
    ):
        assert words in page.words()


def test_curves_are_those_of_the_weights(page: Reader) -> None:
    words = page.words("loss")
    assert f"training {LAST:.3f}" in words
    assert "step 4 training 5.000 multi-token prediction 5.500" in words
    assert "step 5 training 7.250" in words  # of the second life, not of the first
    assert "step 4: went on from a checkpoint" in words


def test_the_bill_adds_up(run_dir: Path, page: Reader) -> None:
    words = page.words("budget")
    summary = summarize(run_dir)
    hours = {name: gpu_ms / 3.6e6 for name, gpu_ms in summary.buckets.items()}
    hours |= {"productive": summary.productive_ms / 3.6e6, "rolled back": summary.rolled_back_ms / 3.6e6}
    for name in ("productive", "rolled back", "evaluation"):
        assert hours[name] > 0
        assert f"{name} {hours[name]:.4f} {100 * hours[name] / 2:.1f} %" in words
    assert "allocated 2.0000 100 % all of it, in 2 launches" in words
    assert "exposed exchange 0.1440 10.0 %" in words
    assert "left 2.0000" in words
    assert "a trillion retained tokens 250,000,000 180,000 1,389 times" in words


def test_incidents_come_in_order(page: Reader) -> None:
    words = page.words("incidents")
    told = ["spike", "a rank died, torchrun exited with 1", "went on from step 4; 2 steps undone"]
    places = [words.index(text) for text in told]
    assert places == sorted(places)
    assert "steps done" not in words


def test_memory_and_expert_load(page: Reader) -> None:
    assert "rank 1 200 MB 310 MB" in page.words("memory")
    assert "layer 01" in page.words("experts")
    assert "last: 0.00 to 2.00 of the mean, 1 unused" in page.words("experts")


def test_the_configuration_is_whole(run_dir: Path, page: Reader) -> None:
    words = page.words("configuration")
    for text in (
        "routed_scaling_factor 2.5",
        "name dualpipev",
        "layout null",
        "mtp_weight.0 0.3",
        f"run_dir {run_dir}",
    ):
        assert text in words


def test_the_real_timeline_is_that_of_the_last_step(run_dir: Path, page: Reader) -> None:
    ranks = read_trace(run_dir / "trace" / "trace.json")
    columns = config(run_dir).topology.dp
    real = last_step(program(run_dir), [ranks[0], ranks[columns]])
    assert real is not None
    times = mean_times(real)
    assert [times.forward, times.whole_backward, times.whole_pair] == pytest.approx([2, 2, 2])  # step 2, in ms
    assert f"took {real.makespan:.1f} ms" in page.words("schedule")
    assert "As it ran" in page.words("schedule")
    assert "As it runs on paper" in page.words("schedule")
    assert page.words("schedule").count("rank 1: F chunk 0 micro-batch 0") == 2


def test_a_timeline_of_another_program_is_not_drawn(run_dir: Path, tmp_path: Path) -> None:
    record_run(tmp_path)
    record_trace(tmp_path)
    trace = tmp_path / "trace" / "trace.json"
    trace.write_text(trace.read_text().replace("F chunk 0 micro-batch 0", "F chunk 0 micro-batch 7"))
    words = report_of(tmp_path).words("schedule")
    assert "not of the program that the configuration describes" in words
    assert "on paper" in words
    assert "As it ran" not in words
    trace.write_text("half a fi")
    assert "is no timeline" in report_of(tmp_path).words("schedule")


def test_what_was_not_recorded_is_said_with_what_records_it(tmp_path: Path) -> None:
    record_run(tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    kept = [line for line in metrics.read_text().splitlines(keepends=True) if '"kind": "memory"' not in line]
    metrics.write_text("".join(kept))
    page = report_of(tmp_path)
    assert "telemetry.trace=true" in page.words("schedule")
    assert "on paper" in page.words("schedule")
    assert "telemetry.terms_every" in page.words("memory")


def test_a_run_that_has_not_begun_has_a_page(tmp_path: Path) -> None:
    own(tmp_path)
    page = report_of(tmp_path)
    assert list(page.text) == SECTIONS
    assert "not begun" in page.words()
    assert "no step yet" in page.words()
    assert "No curves: no step has been told of yet" in page.words("loss")
    assert "there is no ledger yet" in page.words("budget")
    assert "No timeline" in page.words("schedule")
    assert "Nothing is recorded yet" in page.words("incidents")
    assert "not recorded" in page.words("configuration")


def test_losses_that_are_not_numbers_break_nothing(tmp_path: Path) -> None:
    own(tmp_path)
    stream = EventStream(tmp_path, [])
    stream.emit(step(1))
    assert "no loss that was told of is finite" in report_of(tmp_path).words("loss")
    stream.emit(step(2, loss=3.5))
    stream.emit(step(3, loss=float("inf")))
    stream.emit(Event("stop", 3, {"reason": "step 4: loss nan: not finite"}))
    stream.close()
    page = report_of(tmp_path)
    assert "step 2 training 3.500" in page.words("loss")
    assert "training inf" in page.words("loss")
    assert "ended by a fault" in page.words()


@pytest.mark.parametrize("text", ["a: 1\na: 2", "a: !!python/object:os.system {}", "5"])
def test_a_config_yaml_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    """It is read where no rank has said how it was configured."""
    own(tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config.yaml.*restore it, or remove it"):
        read_run(tmp_path)


def test_a_broken_ledger_is_told_in_its_place(tmp_path: Path) -> None:
    record_run(tmp_path)
    work = tmp_path / "ledger" / "work.jsonl"
    work.write_text(work.read_text().replace('"tokens":1000', '"tokens":9000', 1))
    page = report_of(tmp_path)
    assert "chain of hashes is broken" in page.words("budget")
    assert f"training {LAST:.3f}" in page.words("loss")


def test_the_command_writes_where_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record_run(tmp_path / "run")
    assert shoestring("report", tmp_path / "run") == 0
    assert shoestring("report", tmp_path / "run", "--out", tmp_path / "page.html") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"wrote {tmp_path / 'run' / 'report.html'}",
        f"wrote {tmp_path / 'page.html'}",
    ]
    assert f"step {STEPS}" in Reader((tmp_path / "page.html").read_text()).words()


def test_what_is_no_run_or_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other").mkdir()
    record_run(tmp_path / "run")
    for arguments, field in (
        (("report", tmp_path / "absent"), "RUN = "),
        (("report", tmp_path / "other"), "RUN = "),
        (("report", tmp_path / "run", "--out", tmp_path / "absent" / "page.html"), "--out = "),
    ):
        assert shoestring(*arguments) == 2
        assert field in capsys.readouterr().err
    assert not list((tmp_path / "other").iterdir())
