"""Weights & Biases sink, offline by default.

It is imported only when a run opens the sink, since importing wandb is slow.
"""

import html
import os
import re
import secrets
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import wandb
from numpy.typing import NDArray
from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

from ...comm.errors import ConfigError, Problem
from ...comm.files.file_io import read_text, replace_file_atomically
from ...comm.files.strict_json import MalformedFileError
from ...comm.units import ceil_div
from .config import WandbConfig
from .events import JSON, BudgetReported, Event, RunStarted, RunStopped, StepLogged, TextSampled, WarningRaised

WANDB_RUN_ID_FILE = "wandb_run_id"
_RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MOST_BINS = 512  # wandb.Histogram refuses more
_KEPT_EVENTS = 300
"""Events that are kept to be sent again: wandb's service buffers up to 32 KiB, and a row has at least 150 bytes."""
_SERVICE_STARTS = 3
_PROCESS_IS_GONE = (wandb.errors.Error, OSError, HandleAbandonedError, MailboxClosedError)
"""Errors of a start that may mean that wandb's process has ended; unwritable files raise them at every attempt."""


def wandb_account_problems() -> Iterator[Problem]:
    """Yield a problem if this machine has no wandb API key; contacts no server."""
    try:
        # wandb.init would prompt for a key on the terminal of an unattended run.
        found = wandb.login(prompt=False, verify=False)
        reason = "no API key is configured"
    except (wandb.errors.Error, OSError, ValueError) as error:
        found, reason = False, str(error)
    if not found:
        yield Problem("telemetry.wandb.mode", "online", f"{reason}; run `wandb login`, or write offline")


class WandbSink:
    """One wandb run for all attempts of a run directory; its files are in `run_dir/wandb`.

    `lines` is the number of lines in metrics.jsonl at the start. Raises `ConfigError` on `telemetry.wandb` if wandb
    cannot start.

    wandb writes from a separate process, which ends at the SIGTERM that Slurm and systemd send to every process of a
    job, and loses unwritten events. Then another process is started and gets the last events again.
    """

    name = "wandb"

    def __init__(self, config: WandbConfig, run_dir: Path, lines: int) -> None:
        # wandb's step must grow even when training steps are repeated after a crash: it is the line number
        # of the event in metrics.jsonl. Plots use `step`, the training step.
        self._line = lines
        self._config, self._run_dir = config, run_dir
        self._heads: list[Event] = []
        self._recent: deque[tuple[int, Event]] = deque(maxlen=_KEPT_EVENTS)
        self._starts = 0
        self._start()

    def _start(self) -> None:
        """Start or resume the wandb run; retry a few times if wandb's process ends meanwhile."""
        while True:
            self._starts += 1
            try:
                self._open()
            except (
                wandb.errors.UsageError,
                wandb.errors.CommError,
            ) as error:  # no key, or the server's answer
                raise self._start_error(error) from error
            except _PROCESS_IS_GONE as error:
                if self._starts == _SERVICE_STARTS or not self._can_have_files():
                    raise self._start_error(error) from error
                _forget_process()
            else:
                return

    def _open(self) -> None:
        config = self._config
        if config.mode == "online" and not wandb.login(prompt=False):
            raise wandb.errors.UsageError("no API key is configured")
        self._run = wandb.init(
            mode="online" if config.mode == "online" else "offline",
            project=config.project,
            entity=config.entity,
            name=config.name or Path(os.path.realpath(self._run_dir)).name,
            id=_run_id(self._run_dir),
            resume="allow",
            dir=str(self._run_dir),
            settings=wandb.Settings(silent=True, console="off", disable_git=True, x_save_requirements=False),
        )
        self._run.define_metric("*", step_metric="step")

    def _start_error(self, error: Exception) -> ConfigError:
        if not self._can_have_files():
            fix = f"its folder, {self._run_dir / 'wandb'}, is none: remove it, or set telemetry.wandb.mode to disabled"
        elif self._config.mode == "online":
            fix = "run `wandb login`, or set telemetry.wandb.mode to offline"
        else:
            fix = f"see that {self._run_dir / 'wandb'} can be written, or set telemetry.wandb.mode to disabled"
        return ConfigError([Problem("telemetry.wandb", self._config.mode, f"wandb could not start ({error}); {fix}")])

    def _can_have_files(self) -> bool:
        """Return True if wandb's folder exists or can be created."""
        folder = self._run_dir / "wandb"
        return folder.is_dir() or not (folder.exists() or folder.is_symlink())

    def emit(self, event: Event) -> None:
        """Send `event` to wandb as configuration, summary, or a row of history."""
        self._line += 1
        if isinstance(event, RunStarted):
            self._heads.append(event)
        else:
            self._recent.append((self._line, event))
        try:
            self._send(event, self._line)
            alert = _alert(event)
            if alert is not None:
                self._run.alert(*alert)
        except Exception as error:
            self._start_again(error)

    def _send(self, event: Event, line: int) -> None:
        if isinstance(event, RunStarted):
            self._run.config.update(dict(event.values), allow_val_change=True)  # type: ignore[no-untyped-call]
        elif isinstance(event, BudgetReported | RunStopped):
            self._run.summary.update({f"{event.kind}/{key}": value for key, value in event.values.items()})
        elif not isinstance(event, WarningRaised):
            prefix = "" if isinstance(event, StepLogged) else f"{event.kind}/"
            row = {f"{prefix}{key}": _shown(event, value) for key, value in event.values.items()}
            self._run.log({"step": event.step, **row}, step=line)

    def _start_again(self, error: Exception) -> None:
        """Restart wandb's process and send the last events and alert again. Raises `error` after too many restarts."""
        if self._starts == _SERVICE_STARTS:
            raise error
        _forget_process()
        self._start()
        try:
            for event in self._heads:
                self._send(event, self._line)
            for line, event in self._recent:
                self._send(event, line)
            alert = _alert(self._recent[-1][1]) if self._recent else None
            if alert is not None:
                self._run.alert(*alert)
        except Exception as another:
            self._start_again(another)

    def close(self) -> None:
        """Finish the run; online, this waits for the upload."""
        try:
            self._run.finish()
        except Exception as error:
            self._start_again(error)
            self._run.finish()
        # finish returns while wandb's service process is still writing the file; teardown waits for the service.
        wandb.teardown()


def _forget_process() -> None:
    """Reset wandb so that it can start another process."""
    # It reports a dead process in many ways, SystemExit included.
    with suppress(Exception, SystemExit):
        wandb.teardown()


def _alert(event: Event) -> tuple[str, str, str] | None:
    """Return title, text and level of the alert that wandb sends about `event`, or None."""
    match event:
        case WarningRaised():
            return f"{event.about} at step {event.step}", event.message, "WARN"
        case RunStopped(reason=reason) if reason != "done":
            return f"stopped at step {event.step}", reason, "ERROR"
    return None


def _run_id(run_dir: Path) -> str:
    """Return the wandb run ID of `run_dir`; create one at the first attempt."""
    path = run_dir / WANDB_RUN_ID_FILE
    try:
        found = read_text(path, 1000).strip()
        if _RUN_ID.fullmatch(found):
            return found
        why: object = f"it holds {found!r}"
    except FileNotFoundError:
        why = None
    except (MalformedFileError, OSError) as error:
        why = error
    new = secrets.token_hex(4)
    if why is not None:
        print(f"shoestring train: {path} holds no wandb run ID ({why}); starting a new run: {new}", file=sys.stderr)
    replace_file_atomically(path, f"{new}\n".encode())
    return new


def _shown(event: Event, value: JSON) -> object:
    if isinstance(event, TextSampled) and isinstance(value, str):
        return wandb.Html(f"<pre>{html.escape(value)}</pre>", inject=False)
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        return wandb.Histogram(np_histogram=_bars(value))
    return value


def _bars(load_E: Sequence[JSON]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return a histogram whose bar e is the load of expert e; beyond 512 experts, neighbors share a bar."""
    counts_E = np.array(load_E, dtype=np.float64)
    edges = np.append(np.arange(0, len(counts_E), ceil_div(len(counts_E), _MOST_BINS)), len(counts_E))
    return np.add.reduceat(counts_E, edges[:-1]), edges.astype(np.float64)
