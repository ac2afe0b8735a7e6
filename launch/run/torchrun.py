"""torchrun from Python: its arguments for the ranks of one machine, and a run of such ranks with a time limit."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from subprocess import Popen
from typing import Any

from ...comm.loopback import find_loopback_address
from .rank_environment import COMMON_SETTINGS, SAFE_PATH_ENVIRONMENT, build_rank_environment, single_node_settings
from .signals import LAUNCHER_PID_ENV_VAR, die_with_parent

# With -P the working directory is not on the path, where a user's `token.py` would hide Python's module.
TORCHRUN_COMMAND = (sys.executable, "-P", "-m", "shoestring.launch.run.torchrun_agent")
RANK_MODULE_ARGUMENTS = ("-m", "shoestring.launch.run.start_rank")
"""Python's arguments for a rank; MODULE:FUNCTION and the path that the function takes follow them."""

_SECONDS_TO_END = 30


class RanksFailed(RuntimeError):  # noqa: N818 -- says what happened
    """Ranks failed, or did not end in time. Their messages are on their standard error."""


def local_torchrun_arguments(processes: int) -> list[str]:
    """Return the arguments for `processes` ranks on this machine. Raises `ConfigError` without a loopback address."""
    # An address, not a name: neither the host name nor `localhost` resolves everywhere.
    return ["--rdzv-backend=loopback", f"--rdzv-endpoint={find_loopback_address()}", f"--nproc-per-node={processes}"]


def run_local_ranks(arguments: Sequence[str], processes: int, seconds: float) -> None:
    """Run `python <arguments>` as `processes` ranks on this machine, to the end. Raises `RanksFailed`."""
    with tempfile.TemporaryDirectory() as logs:  # without --log-dir torchrun leaves a folder behind
        command = [*TORCHRUN_COMMAND, *local_torchrun_arguments(processes), f"--log-dir={logs}", *arguments]
        variables = {**SAFE_PATH_ENVIRONMENT, LAUNCHER_PID_ENV_VAR: str(os.getpid())}
        environment = build_rank_environment(variables, [*COMMON_SETTINGS, *single_node_settings()])
        process = Popen(command, env=environment, preexec_fn=die_with_parent)
        try:
            wait_for_torchruns([process], seconds)
        finally:
            terminate_torchrun(process)


def wait_for_torchruns(torchruns: Sequence[Popen[Any]], seconds: float) -> None:
    """Wait for all torchruns. Raises `RanksFailed` if one does not end within `seconds`, or not with code 0."""
    try:
        codes = [process.wait(seconds) for process in torchruns]
    except subprocess.TimeoutExpired:
        raise RanksFailed(f"the ranks did not end within {seconds:g} s and were stopped") from None
    if any(codes):
        listed = ", ".join(map(str, codes))
        raise RanksFailed(f"a rank failed (torchrun exit code {listed}); see its messages above")


def terminate_torchrun(process: Popen[Any]) -> None:
    """End torchrun with SIGINT, which it forwards to its ranks, then with SIGKILL, at which its ranks die too."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
