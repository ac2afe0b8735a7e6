"""One input, run by a fork of this process, which has imported everything, within limits of time and memory."""

import os
import resource
import shutil
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NoReturn

from shoestring.launch.cli import main

from .kinds import KINDS, Input
from .lines import Lines

CPU_SECONDS = 10
"""CPU time of one input; more is a hang."""
IDLE_SECONDS = 10
"""Seconds without CPU use after which an input counts as hung; no command waits that long for anything."""
_MEMORY = 24 * 2**30
"""Bytes of addresses: torch alone maps several GB."""
_RAISED = 70


@dataclass(frozen=True)
class Trial:
    """The result of one input."""

    kind: str
    seed: int
    arguments: tuple[str, ...]
    code: int
    seconds: float
    """CPU seconds."""
    words: str
    """The end of the output."""
    wrong: str
    """Description of the failure; empty if there is none."""
    lines: tuple[tuple[str, int], ...]
    """The lines of the readers that ran; empty if it hung."""


def run_trial(kind: str, seed: int, seeds: Path, folder: Path, lines: Lines) -> Trial:
    """Make the input of this seed in `folder`, run it, and remove the folder."""
    folder.mkdir()
    try:
        made = KINDS[kind](Random(f"{kind} {seed}"), seeds, folder)
        code, seconds, words, seen = _fork(made, folder.parent / f"{folder.name}.out", lines)
        return Trial(kind, seed, made.arguments, code, seconds, words[-3000:], _wrong(made, code, words), seen)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wrong(made: Input, code: int, words: str) -> str:
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return "a hang"
    if "Traceback (most recent call last)" in words:
        return "a traceback"
    if code not in made.codes:
        return f"exit code {code}"
    if code == 2 and made.made is not None and os.path.lexists(made.made):
        return f"{made.made} is left"
    if code == 2 and ": error" not in words and "error:" not in words:
        return "a refusal without a word"
    return ""


def _fork(made: Input, out: Path, lines: Lines) -> tuple[int, float, str, tuple[tuple[str, int], ...]]:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    child = os.fork()
    if child == 0:
        _be_the_child(made, out, lines)
    status = _wait(child)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    words = out.read_text(errors="replace")
    out.unlink()
    seen = out.with_suffix(".lines")
    found: tuple[tuple[str, int], ...] = ()
    if seen.exists():
        pairs = (line.rpartition(" ") for line in seen.read_text().splitlines())
        found = tuple((name, int(number)) for name, _, number in pairs)
        seen.unlink()
    return os.waitstatus_to_exitcode(status), seconds, words, found


def _wait(child: int) -> int:
    """Return the exit status. On a busy machine CPU seconds take minutes: a process is idle when it sleeps."""
    busy, pause = time.monotonic(), 0.005
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        if state != "S":
            busy = time.monotonic()
        if time.monotonic() - busy > IDLE_SECONDS:
            os.kill(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1]
        time.sleep(pause)
        pause = min(0.1, pause * 1.5)


def _be_the_child(made: Input, out: Path, lines: Lines) -> NoReturn:
    """Run the input and end this process."""
    code = _RAISED
    try:
        descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 2))
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.environ["COLUMNS"] = "200"
        lines.clear()
        try:
            main(list(made.arguments))
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else 1
        out.with_suffix(".lines").write_text("".join(f"{name} {number}\n" for name, number in sorted(lines.seen)))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
