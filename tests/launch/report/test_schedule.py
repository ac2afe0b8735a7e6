"""The timeline of a report: of the step traced last, and of no other program."""

from pathlib import Path

import pytest

from shoestring.launch.report.schedule import last_traced_step, mean_op_times
from shoestring.tests.launch.report.reader import Reader
from shoestring.tests.launch.report.recorded import config, program, record_run, record_trace, report_of
from shoestring.trainer.telemetry.trace import read_trace


def test_the_real_timeline_is_that_of_the_last_step(run_dir: Path, page: Reader) -> None:
    ranks = read_trace(run_dir / "trace" / "trace.json")
    columns = config(run_dir).topology.dp
    real = last_traced_step(program(run_dir), [ranks[0], ranks[columns]])
    assert real is not None
    times = mean_op_times(real)
    assert [times.forward, times.backward_duration, times.forward_backward_duration] == pytest.approx(
        [2, 2, 2]
    )  # step 2, in ms
    assert f"took {real.makespan:.1f} ms" in page.words("schedule")
    assert "Measured" in page.words("schedule")
    assert "Simulated" in page.words("schedule")
    assert page.words("schedule").count("rank 1: F chunk 0 micro-batch 0") == 2


def test_a_timeline_of_another_program_is_not_drawn(run_dir: Path, tmp_path: Path) -> None:
    record_run(tmp_path)
    record_trace(tmp_path)
    trace = tmp_path / "trace" / "trace.json"
    trace.write_text(trace.read_text().replace("F chunk 0 micro-batch 0", "F chunk 0 micro-batch 7"))
    words = report_of(tmp_path).words("schedule")
    assert "does not match the configured program" in words
    assert "simulated" in words
    assert "Measured" not in words
    trace.write_text("half a fi")
    assert "is no timeline" in report_of(tmp_path).words("schedule")
