"""torchrun from Python: its arguments for ranks of this machine alone, and a run of ranks that has an end."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from subprocess import Popen
from typing import Any

from ...comm.loopback import find_loopback_address
from .rank_environment import COMMON_SETTINGS, SAFE_PATH_ENVIRONMENT, build_rank_environment, single_node_settings

# With -P the working directory is not on the path: a `token.py` there is not ours to import.
TORCHRUN_COMMAND = (sys.executable, "-P", "-m", "shoestring.launch.run.torchrun_agent")

_SECONDS_TO_END = 30


class RanksFailed(RuntimeError):  # noqa: N818 -- says what happened
    """Ranks have ended with a fault, or did not end in time. What they had to say is on their standard error."""


def local_torchrun_arguments(processes: int) -> list[str]:
    """Arguments for so many ranks, all of them here. Raises `ConfigError` where this machine cannot reach itself."""
    # An address and not a name: neither the host's name nor `localhost` resolves everywhere.
    return ["--rdzv-backend=loopback", f"--rdzv-endpoint={find_loopback_address()}", f"--nproc-per-node={processes}"]


def run_local_ranks(arguments: Sequence[str], processes: int, seconds: float) -> None:
    """Run `python <arguments>` as so many ranks of this machine, to their end. Raises `RanksFailed`."""
    with tempfile.TemporaryDirectory() as logs:  # torchrun would leave one of its own behind
        command = [*TORCHRUN_COMMAND, *local_torchrun_arguments(processes), f"--log-dir={logs}", *arguments]
        process = Popen(
            command, env=build_rank_environment(SAFE_PATH_ENVIRONMENT, [*COMMON_SETTINGS, *single_node_settings()])
        )
        try:
            wait_for_torchruns([process], seconds)
        finally:
            terminate_torchrun(process)


def wait_for_torchruns(torchruns: Sequence[Popen[Any]], seconds: float) -> None:
    """Until each has ended. Raises `RanksFailed` for one that does not, or ends with another code than 0."""
    try:
        codes = [process.wait(seconds) for process in torchruns]
    except subprocess.TimeoutExpired:
        raise RanksFailed(f"the ranks have not ended within {seconds:g} s and were stopped") from None
    if any(codes):
        which = ", ".join(map(str, codes))
        raise RanksFailed(f"the ranks failed, torchrun exited with {which}; their words are above")


def terminate_torchrun(process: Popen[Any]) -> None:
    """torchrun passes SIGINT on to its ranks; one that does not end takes them along by the death of their parent."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
