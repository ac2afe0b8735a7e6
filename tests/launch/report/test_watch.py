"""`shoestring watch`: a run from before its first step to after its end."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from shoestring.comm.errors import ConfigError
from shoestring.launch.cli import main
from shoestring.launch.report.run_follower import RunFollower
from shoestring.launch.report.watch import watch
from shoestring.launch.report.watch_frame import HEARTBEAT_TIMEOUT_SECONDS
from shoestring.launch.run.run_dir import create_run_dir
from shoestring.tests.launch.report.followed import append, shown
from shoestring.tests.launch.report.recorded import BUDGET, LAST, Clock, events, record_run, step
from shoestring.trainer.ledger.allocation_journal import AllocationJournal


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
        "2.0k tokens/s  MFU 25.0 %",
        "largest 2.00 x the mean",
        "2.0000 of 4.0000 GPU-hours",
        "250,000,000 GPU-hours per trillion tokens (DeepSeek-V3: 180,000)",
        "72.0 %  rolled back 18.0 %  evaluation 10.0 %",
        "resume at step 4",
    ):
        assert words in text
    assert "left" not in text
    assert "projected" not in text
    assert "\x1b" not in text


def test_it_ends_with_the_run(tmp_path: Path) -> None:
    """The run makes one step each time that the command waits for it."""
    create_run_dir(tmp_path)
    clock = Clock()
    left = iter(list(events(tmp_path)))
    with clock.told():
        allocation = AllocationJournal(tmp_path, ranks=2, attempt="a", budget=BUDGET, heartbeat_seconds=1000)

        def go_on() -> None:
            event = next(left, None)
            clock.seconds += 1
            if event is None:
                allocation.close("8 steps done")
            else:
                append(tmp_path, event)

        console = Console(file=io.StringIO(), force_terminal=True, width=80)
        watch(tmp_path, console, wait_for_refresh=go_on)
    assert next(left, None) is None
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.index("none yet") < text.index("1 of 8") < text.index("8 of 8") < text.rindex("done")
    assert "0.0106 of 4.0000 GPU-hours" in text  # 19 seconds of two ranks


def test_ctrl_c_ends_the_watching(tmp_path: Path) -> None:
    create_run_dir(tmp_path)

    def interrupt() -> None:
        raise KeyboardInterrupt

    console = Console(file=io.StringIO(), width=80)
    watch(tmp_path, console, wait_for_refresh=interrupt)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("none yet") == 1


def test_a_launcher_that_was_killed_is_missed(tmp_path: Path) -> None:
    create_run_dir(tmp_path)
    clock = Clock()
    with clock.told():
        allocation = AllocationJournal(tmp_path, ranks=2, attempt="a", budget=BUDGET, heartbeat_seconds=1000)
        append(tmp_path, step(1, loss=3.0))
        follower = RunFollower(tmp_path)
        clock.seconds += HEARTBEAT_TIMEOUT_SECONDS - 1
        assert "no heartbeat" not in shown(follower)
        clock.seconds += 2
        assert "no heartbeat from the launcher for 0:31" in shown(follower)
        assert not follower.poll().has_ended
        allocation.close("tidied up")


def test_another_place_is_refused(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ConfigError, match="RUN = "):
            watch(place, Console(file=io.StringIO()), once=True)
