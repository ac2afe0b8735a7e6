"""Curves of a report: those of the retained steps, also where losses are not finite."""

from pathlib import Path

from shoestring.launch.run.run_dir import create_run_dir
from shoestring.tests.launch.report.reader import Reader
from shoestring.tests.launch.report.recorded import LAST, report_of, step
from shoestring.trainer.telemetry.events import RunStopped
from shoestring.trainer.telemetry.stream import EventStream


def test_curves_are_those_of_the_weights(page: Reader) -> None:
    words = page.words("loss")
    assert f"training {LAST:.3f}" in words
    assert "step 4 training 5.000 multi-token prediction 5.500" in words
    assert "step 5 training 7.250" in words  # of the second attempt, not of the first
    assert "step 4: resumed from a checkpoint" in words


def test_losses_that_are_not_numbers_break_nothing(tmp_path: Path) -> None:
    create_run_dir(tmp_path)
    stream = EventStream(tmp_path, [])
    stream.emit(step(1))
    assert "no logged loss is finite" in report_of(tmp_path).words("loss")
    stream.emit(step(2, loss=3.5))
    stream.emit(step(3, loss=float("inf")))
    stream.emit(RunStopped(step=3, reason="step 4: loss nan: not finite"))
    stream.close()
    page = report_of(tmp_path)
    assert "step 2 training 3.500" in page.words("loss")
    assert "training inf" in page.words("loss")
    assert "failed" in page.words()
