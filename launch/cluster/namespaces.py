"""A pretended machine: processes in network, process-id, mount and host-name namespaces of their own (Linux, root).

Nothing here has a name on the host, so nothing can clash and nothing can be left behind. The first process of a machine
is a `cat` whose input is a pipe from the owner. When the owner closes the pipe, or dies of whatever cause, `cat` ends;
the kernel then kills every other process of its process-id namespace, and with the last of them go the network
namespace, its interfaces and its mounts.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ...comm.errors import Problem

_PROGRAMS = {
    "ip": "iproute2",
    "tc": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "mount": "mount",
    "tee": "coreutils",
}
"""What is called, and the Debian package that it comes with."""
_UNSHARE = ("unshare", "--net", "--pid", "--mount", "--uts", "--fork", "--mount-proc")


def namespace_problems() -> Iterator[Problem]:
    """Why machines cannot be pretended here: programs that are not there, a user who may not."""
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    for program in missing:
        yield Problem(program, None, f"no such program on PATH; it comes with the package {_PROGRAMS[program]}")
    if os.geteuid() != 0:
        yield Problem("user", os.geteuid(), "must be root: network namespaces and their interfaces are made")
    elif "unshare" not in missing:
        probe = subprocess.run([*_UNSHARE, "true"], capture_output=True, text=True, check=False)
        if probe.returncode:
            hint = f"even root may not make namespaces here ({probe.stderr.strip()}); a container must be privileged"
            yield Problem("user", 0, hint)


class NamespaceProcess(subprocess.Popen[str]):
    """A process on a pretended machine: a `Popen` of nsenter, whose exit code is that of the process.

    Signals are for the process itself; nsenter would die of them and leave it running. It is in a session of its own,
    so Ctrl-C in the terminal reaches the owner alone, who decides how the machines end.
    """

    def send_signal(self, sig: int) -> None:
        """Send `sig` to the process, if it has not ended."""
        child = _child(self)
        if child is not None:
            with suppress(ProcessLookupError):  # it has ended, and nsenter is about to
                os.kill(child, sig)


@dataclass(frozen=True)
class NamespaceNode:
    """A pretended machine that is on. It has no interface but lo, which is down."""

    unshare_process: subprocess.Popen[bytes]
    """`unshare`, which waits for `cat` and ends after every process of the machine."""
    init_pid: int
    """Process id of `cat`, as the owner sees it: what names the namespaces."""

    @staticmethod
    def create() -> NamespaceNode:
        """Switch a machine on. Its working directory is the owner's."""
        pipe = subprocess.PIPE
        holder = subprocess.Popen([*_UNSHARE, "cat"], stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stderr is not None
        # What comes back has gone through `cat`, so all namespaces are there.
        with suppress(BrokenPipeError):
            holder.stdin.write(b"on\n")
            holder.stdin.flush()
        first = _child(holder) if holder.stdout.readline() else None
        if first is None:
            with holder:
                raise subprocess.CalledProcessError(holder.wait(), _UNSHARE, stderr=holder.stderr.read().decode())
        return NamespaceNode(holder, first)

    def start_process(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        stdout: int | IO[str] | None,
        stderr: int | IO[str] | None,
    ) -> NamespaceProcess:
        """Start `command` on the machine. `environment` is all of its environment."""
        return NamespaceProcess(
            ["nsenter", f"--target={self.init_pid}", "--net", "--pid", "--mount", "--uts", "--wd", "--", *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            text=True,
            errors="replace",
            start_new_session=True,
        )

    def run_setup_command(self, *command: str, stdin_text: str = "") -> None:
        """Run a program that changes the machine to its end, with `text` as its input.

        It does not enter the process-id namespace, so process ids mean what they mean to the owner. Raises
        `CalledProcessError` where it fails.
        """
        enter = ["nsenter", f"--target={self.init_pid}", "--net", "--mount", "--uts", "--"]
        subprocess.run([*enter, *command], input=stdin_text, capture_output=True, text=True, check=True)

    def interface_bytes_sent(self, interface: str) -> int:
        """What the kernel has counted."""
        for line in Path(f"/proc/{self.init_pid}/net/dev").read_text().splitlines():
            name, _, counters = line.partition(":")
            if name.strip() == interface:
                return int(counters.split()[8])  # eight columns of what was received come first
        raise ValueError(f"no interface {interface}")

    def kill_all_processes(self) -> None:
        """Kill every process of the machine and wait until the last has gone."""
        with self.unshare_process:  # closes the pipe, waits for unshare
            if self.unshare_process.poll() is None:
                os.kill(self.init_pid, signal.SIGKILL)  # a fork of the owner may hold the pipe open


def _child(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> int | None:
    """The process that nsenter or unshare has forked, or is about to fork; None when they have ended."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None:
        if found := children.read_text().split():
            return int(found[0])
        time.sleep(0.001)  # until it forks
    return None
