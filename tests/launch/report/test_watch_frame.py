"""One frame of a watched run."""

from pathlib import Path

from shoestring.launch.report.run_follower import RunFollower
from shoestring.launch.report.watch_frame import sparkline
from shoestring.launch.run.run_dir import create_run_dir
from shoestring.tests.launch.report.followed import append, shown
from shoestring.tests.launch.report.recorded import record_run, step
from shoestring.trainer.telemetry.events import WarningRaised


def test_a_frame_fits_into_eighty_columns(tmp_path: Path) -> None:
    record_run(tmp_path)
    path, *lines = shown(RunFollower(tmp_path)).replace(f"{tmp_path}\n", "run\n").splitlines()
    assert path == "run"
    assert max(map(len, lines)) <= 80
    assert len(lines) == 1 + 9 + 1 + 5  # none is wrapped


def test_a_loss_that_is_not_a_number_is_shown(tmp_path: Path) -> None:
    create_run_dir(tmp_path)
    append(tmp_path, step(1, loss=3.0), step(2))
    append(tmp_path, WarningRaised(step=2, about="spike", message="the loss is \x1b[2Jnan"))
    text = shown(RunFollower(tmp_path))
    assert "nan" in text
    assert "step 2, spike: the loss is" in text
    assert "\x1b[2J" not in text


def test_a_spark_goes_from_the_lowest_to_the_highest() -> None:
    assert sparkline([8, 1, 4.5, float("nan"), 8], 40) == "█▁▅█"
    assert sparkline([1, 2, 3], 2) == "▁█"
    assert sparkline([2.0, 2.0], 9) == "▁▁"
    assert sparkline([float("nan")], 9) == ""
