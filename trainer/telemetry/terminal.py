"""Terminal sinks: a live progress bar for a terminal, plain lines for a file or pipe."""

from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from .events import Event, StepLogged
from .format import describe_event
from .stream import Sink


def make_terminal_sink(stream: TextIO) -> Sink:
    """Return the sink for `stream`: live on a terminal, plain lines without control codes elsewhere."""
    return LiveTerminalSink(Console(file=stream, force_terminal=True)) if stream.isatty() else PlainTerminalSink(stream)


class PlainTerminalSink:
    """Sink that prints one line per event."""

    name = "the terminal"

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def emit(self, event: Event) -> None:
        """Print `event`."""
        print(describe_event(event), file=self._stream, flush=True)

    def close(self) -> None:
        """Do nothing: the caller owns the stream."""


class LiveTerminalSink:
    """Sink with a progress bar and the last step at the bottom; other events scroll above it."""

    name = "the terminal"

    def __init__(self, console: Console) -> None:
        # Drawn only when an event comes: no thread competes with the run. Standard output is not redirected, it may
        # be piped.
        self._live = Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
        self._live.start()

    def emit(self, event: Event) -> None:
        """Update the bar for a step; print any other event above it."""
        if isinstance(event, StepLogged):
            bar = ProgressBar(total=event.total_steps, completed=event.step, width=40)
            self._live.update(Group(Text(describe_event(event)), bar), refresh=True)
        else:
            self._live.console.print(Text(describe_event(event)))

    def close(self) -> None:
        """Leave the last state on the screen."""
        self._live.stop()
