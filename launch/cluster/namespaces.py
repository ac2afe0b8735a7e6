"""Simulated node: processes in separate network, process-id, mount and host-name namespaces (Linux, root).

Nothing here has a name on the host, so names cannot clash and nothing is left behind. The first process of a node is a
`cat` whose input is a pipe from the owner. When the owner closes the pipe, or dies for any reason, `cat` ends; the
kernel then kills every other process of its process-id namespace, and with the last one removes the network namespace,
its interfaces and its mounts.
"""

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
"""Programs that are called, and the Debian package of each."""
_UNSHARE = ("unshare", "--net", "--pid", "--mount", "--uts", "--fork", "--mount-proc")


def namespace_problems() -> Iterator[Problem]:
    """Yield a problem for each missing program or permission without which nodes cannot be simulated here."""
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    for program in missing:
        yield Problem(program, None, f"no such program on PATH; it comes with the package {_PROGRAMS[program]}")
    if os.geteuid() != 0:
        yield Problem("user", os.geteuid(), "must be root to create network namespaces and interfaces")
    elif "unshare" not in missing:
        probe = subprocess.run([*_UNSHARE, "true"], capture_output=True, text=True, check=False)
        if probe.returncode:
            hint = f"root cannot create namespaces here ({probe.stderr.strip()}); a container must be privileged"
            yield Problem("user", 0, hint)


class NamespaceProcess(subprocess.Popen[str]):
    """Process on a simulated node: a `Popen` of nsenter, whose exit code is that of the process.

    Signals go to the process itself, since nsenter would die of them and leave it running. It is in a separate session,
    so Ctrl-C in the terminal reaches only the owner, which decides how the nodes end.
    """

    def send_signal(self, sig: int) -> None:
        """Send `sig` to the process, if it has not ended."""
        child = _child(self)
        if child is not None:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(child, sig)


@dataclass(frozen=True)
class NamespaceNode:
    """Running simulated node. It has only the interface lo, which is down."""

    unshare_process: subprocess.Popen[bytes]
    """`unshare`, which waits for `cat` and ends after every process of the node."""
    init_pid: int
    """Process id of `cat` in the owner's namespace, which identifies the node's namespaces."""

    @staticmethod
    def create() -> "NamespaceNode":
        """Start a node. Its working directory is the owner's."""
        pipe = subprocess.PIPE
        holder = subprocess.Popen([*_UNSHARE, "cat"], stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stderr is not None
        # An answer has gone through `cat`, so all namespaces exist.
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
        """Start `command` on the node. `environment` is its whole environment."""
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
        """Run a program that configures the node, with `stdin_text` as its input, and wait for it.

        It does not enter the process-id namespace, so process ids are the owner's. Raises `CalledProcessError`.
        """
        enter = ["nsenter", f"--target={self.init_pid}", "--net", "--mount", "--uts", "--"]
        subprocess.run([*enter, *command], input=stdin_text, capture_output=True, text=True, check=True)

    def interface_bytes_sent(self, interface: str) -> int:
        """Return the kernel's count of the bytes that left through `interface`."""
        for line in Path(f"/proc/{self.init_pid}/net/dev").read_text().splitlines():
            name, _, counters = line.partition(":")
            if name.strip() == interface:
                return int(counters.split()[8])  # the first eight columns count what was received
        raise ValueError(f"no interface {interface}")

    def kill_all_processes(self) -> None:
        """Kill every process of the node and wait until the last has ended."""
        with self.unshare_process:  # closes the pipe, waits for unshare
            if self.unshare_process.poll() is None:
                os.kill(self.init_pid, signal.SIGKILL)  # a fork of the owner may hold the pipe open


def _child(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> int | None:
    """Return the process that nsenter or unshare forks, once it has; None if they have ended."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None:
        if found := children.read_text().split():
            return int(found[0])
        time.sleep(0.001)  # until it forks
    return None
