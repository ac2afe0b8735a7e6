"""The stream on a terminal: plain lines for a pipe, a live bar for a person."""

import io
import os
import pty

from shoestring.tests.trainer.telemetry.written_events import EVALUATION, STEP
from shoestring.trainer.telemetry.events import RunStopped
from shoestring.trainer.telemetry.terminal import LiveTerminalSink, make_terminal_sink


def test_a_pipe_gets_plain_lines() -> None:
    stream = io.StringIO()
    sink = make_terminal_sink(stream)
    sink.emit(STEP)
    sink.emit(RunStopped(step=40, reason="done"))
    sink.close()
    lines = stream.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["step", "finished"]
    assert "\x1b" not in stream.getvalue()


def test_a_terminal_gets_a_live_bar() -> None:
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as terminal:
        sink = make_terminal_sink(terminal)
        assert isinstance(sink, LiveTerminalSink)
        sink.emit(EVALUATION)
        sink.emit(STEP)
        sink.close()
        terminal.flush()
        shown = ""
        while "loss 5.213" not in shown:  # it comes in as many pieces as the kernel likes
            shown += os.read(reader, 65536).decode()
    os.close(reader)
    assert "validation loss 5.2500" in shown
    assert "loss 5.213" in shown
    assert "━" in shown
    assert "\x1b[" in shown
