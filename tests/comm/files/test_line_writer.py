"""Lines that a full disk rejects wait in memory; a reader finds whole lines only."""

import json
from pathlib import Path

from shoestring.comm.files.line_writer import LineWriter
from shoestring.tests.full_disk import largest_file
from shoestring.tests.trainer.telemetry.written_events import step
from shoestring.trainer.telemetry.events import StepLogged, WarningRaised
from shoestring.trainer.telemetry.history import read_all_metrics
from shoestring.trainer.telemetry.stream import EventStream


def test_lines_wait_for_room_and_come_in_order(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    writer = LineWriter(path)
    assert writer.append(b"1\n")
    with largest_file(5):
        for line in (b"2\n", b"3333\n", b"4\n"):  # the second one is cut in its middle
            assert writer.append(line)
        assert (writer.pending_lines, writer.write_error) == (2, "File too large")
        assert path.read_bytes() == b"1\n2\n"  # nothing torn, also for a reader that starts now
        assert not writer.fsync()
    assert writer.append(b"5\n")
    assert (writer.pending_lines, writer.write_error) == (0, None)
    writer.close()
    assert path.read_bytes() == b"1\n2\n3333\n4\n5\n"


def test_what_waits_is_bounded(tmp_path: Path) -> None:
    writer = LineWriter(tmp_path / "lines", max_backlog_bytes=6)
    with largest_file(0):
        assert [writer.append(b"12\n") for _ in range(4)] == [True, True, False, False]
    writer.close()
    assert (tmp_path / "lines").read_bytes() == b"12\n12\n"


def test_a_line_longer_than_the_bound_waits_alone(tmp_path: Path) -> None:
    writer = LineWriter(tmp_path / "lines", max_backlog_bytes=6)
    with largest_file(0):
        assert [writer.append(line) for line in (b"123456789\n", b"1\n")] == [True, False]
    writer.close()


def test_a_file_that_was_emptied_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    writer = LineWriter(path)
    writer.append(b"1\n")
    path.write_bytes(b"")
    writer.append(b"2\n")
    with path.open("ab") as file:
        file.write(b"half a li")
    writer.append(b"3\n")
    writer.close()
    assert path.read_bytes() == b"2\n3\n"


def test_events_that_were_left_out_are_counted(tmp_path: Path) -> None:
    stream = EventStream(tmp_path, [], backlog_bytes=100)
    stream.emit(step(1))
    with largest_file(10):
        for number in range(2, 6):
            stream.emit(step(number))
        assert stream.pending_events == 1
    stream.emit(step(6))
    stream.close()
    events = read_all_metrics(tmp_path / "metrics.jsonl")
    assert [event.step for event in events if isinstance(event, StepLogged)] == [1, 2, 6]
    (warning,) = (event.message for event in events if isinstance(event, WarningRaised))
    assert warning == "3 events were dropped here: the disk was full"


def test_metrics_that_were_removed_begin_anew(tmp_path: Path) -> None:
    stream = EventStream(tmp_path, [])
    stream.emit(step(1))
    (tmp_path / "metrics.jsonl").unlink()
    stream.emit(step(2))
    stream.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["warning", "step"]
