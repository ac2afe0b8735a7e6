"""`shoestring watch`: a run as it stands, from before its first step to after its end."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from shoestring.comm.errors import ConfigError
from shoestring.launch.cli import main
from shoestring.launch.report.follow import Follower
from shoestring.launch.report.watch_frame import SILENT_SECONDS, frame, spark
from shoestring.launch.run.run_dir import own
from shoestring.launch.verbs.watch import watch
from shoestring.tests.launch.report.recorded import BUDGET, LAST, Clock, events, record_run, step
from shoestring.trainer.ledger.allocation import Allocation
from shoestring.trainer.telemetry.events import Event, EventStream


def shown(follower: Follower, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(frame(follower.look()))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def append(run_dir: Path, *told: Event) -> None:
    stream = EventStream(run_dir, [])
    for event in told:
        stream.emit(event)
    stream.close()


def test_one_frame_of_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record_run(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["watch", str(tmp_path), "--once"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for words in (
        "done",
        "8 of 8",
        f"{LAST:.3f}",
        "validation 4.500 at step 8",
        "2.0k tokens a second  MFU 25.0 %",
        "fullest expert 2.00 of the mean load",
        "2.0000 of 4.0000 GPU-hours",
        "250,000,000 a trillion tokens (180,000)",
        "72.0 %  rolled back 18.0 %  evaluation 10.0 %",
        "resume at step 4",
    ):
        assert words in text
    assert "to go" not in text
    assert "projected" not in text
    assert "\x1b" not in text


def test_a_frame_fits_into_eighty_columns(tmp_path: Path) -> None:
    record_run(tmp_path)
    path, *lines = shown(Follower(tmp_path)).replace(f"{tmp_path}\n", "run\n").splitlines()
    assert path == "run"
    assert max(map(len, lines)) <= 80
    assert len(lines) == 1 + 9 + 1 + 5  # none is folded


def test_a_run_is_followed_from_before_its_first_step(tmp_path: Path) -> None:
    own(tmp_path)
    follower = Follower(tmp_path)
    assert "none yet" in shown(follower)
    assert "no ledger" in shown(follower)
    run, *_ = events(tmp_path)
    append(tmp_path, run)
    assert "0 of 8" in shown(follower)
    assert "on the way to its next step" in shown(follower)
    append(tmp_path, step(1, loss=7.5))
    assert "1 of 8" in shown(follower)
    assert "7.500" in shown(follower)
    assert "1.5000 projected" not in shown(follower)  # which is said where a ledger says what is spent
    assert "training" in shown(follower)


def test_half_a_line_waits_for_its_end(tmp_path: Path) -> None:
    own(tmp_path)
    line = step(1, loss=7.5).line() + "\n"
    (tmp_path / "metrics.jsonl").write_text(line[:40])
    follower = Follower(tmp_path)
    assert "none yet" in shown(follower)
    (tmp_path / "metrics.jsonl").open("a").write(line[40:])
    assert "7.500" in shown(follower)


def test_a_run_that_begins_anew_is_read_anew(tmp_path: Path) -> None:
    record_run(tmp_path)
    follower = Follower(tmp_path)
    assert "8 of 8" in shown(follower)
    (tmp_path / "metrics.jsonl").unlink()
    shutil.rmtree(tmp_path / "ledger")
    assert "none yet" in shown(follower)
    append(tmp_path, step(1, loss=7.5))
    assert "1 of 8" in shown(follower)
    assert "resume" not in shown(follower)


def test_a_loss_that_is_not_a_number_is_shown(tmp_path: Path) -> None:
    own(tmp_path)
    append(tmp_path, step(1, loss=3.0), step(2))
    append(tmp_path, Event("warning", 2, {"about": "spike", "message": "the loss is \x1b[2Jnan"}))
    text = shown(Follower(tmp_path))
    assert "nan" in text
    assert "step 2, spike: the loss is" in text
    assert "\x1b[2J" not in text


def test_it_ends_with_the_run(tmp_path: Path) -> None:
    """The run goes on by a step each time that somebody waits for it."""
    own(tmp_path)
    clock = Clock()
    left = iter(list(events(tmp_path)))
    with clock.told():
        allocation = Allocation(tmp_path, ranks=2, attempt="a", budget=BUDGET, beat_seconds=1000)

        def go_on() -> None:
            event = next(left, None)
            clock.seconds += 1
            if event is None:
                allocation.close("8 steps done")
            else:
                append(tmp_path, event)

        console = Console(file=io.StringIO(), force_terminal=True, width=80)
        watch(tmp_path, console, wait=go_on)
    assert next(left, None) is None
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.index("none yet") < text.index("1 of 8") < text.index("8 of 8") < text.rindex("done")
    assert "0.0106 of 4.0000 GPU-hours" in text  # 19 seconds of two ranks


def test_ctrl_c_ends_the_watching(tmp_path: Path) -> None:
    own(tmp_path)

    def interrupt() -> None:
        raise KeyboardInterrupt

    console = Console(file=io.StringIO(), width=80)
    watch(tmp_path, console, wait=interrupt)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("none yet") == 1


def test_a_launcher_that_was_killed_is_missed(tmp_path: Path) -> None:
    own(tmp_path)
    clock = Clock()
    with clock.told():
        allocation = Allocation(tmp_path, ranks=2, attempt="a", budget=BUDGET, beat_seconds=1000)
        append(tmp_path, step(1, loss=3.0))
        follower = Follower(tmp_path)
        clock.seconds += SILENT_SECONDS - 1
        assert "no sign of life" not in shown(follower)
        clock.seconds += 2
        assert "no sign of life from its launcher for 0:31" in shown(follower)
        assert not follower.look().has_ended
        allocation.close("tidied up")


def test_another_place_is_refused(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ConfigError, match="RUN = "):
            watch(place, Console(file=io.StringIO()), once=True)


def test_a_spark_goes_from_the_lowest_to_the_highest() -> None:
    assert spark([8, 1, 4.5, float("nan"), 8], 40) == "█▁▅█"
    assert spark([1, 2, 3], 2) == "▁█"
    assert spark([2.0, 2.0], 9) == "▁▁"
    assert spark([float("nan")], 9) == ""
