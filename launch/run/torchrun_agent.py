"""torchrun, as the launcher starts it: `python -P -m shoestring.launch.run.torchrun_agent TORCHRUN_ARGUMENTS`.

It differs from torchrun in three ways. Ranks of one machine connect at a port of its loopback address, while torchrun
listens on every address. It prints one line on the rank that failed. The stop signals, which Slurm and systemd send to
every process of a job, reach the ranks through the launcher's stop file, and the agent waits for the ranks.
"""

import logging
import os
import signal
import sys
import threading
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous
from torch.distributed.run import parse_args, run
from typing_extensions import override

from ...comm.loopback import open_listening_socket
from ..console import print_to_stderr
from .signals import STOP_FILE_ENV_VAR, STOP_SIGNALS

RENDEZVOUS_BACKEND = "loopback"
_SECONDS = 60
_FAILURE = 1


class LoopbackRendezvous(StaticTCPRendezvous):
    """Rendezvous of one machine's ranks, with a store that listens only on the address of `parameters.endpoint`."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        listener = open_listening_socket(parameters.endpoint)
        address, port = listener.getsockname()[:2]
        super().__init__(address, port, rank=0, world_size=1, run_id=parameters.run_id, timeout=_SECONDS)
        limit, descriptor = timedelta(seconds=_SECONDS), listener.detach()  # the store closes the descriptor
        self._loopback_store = dist.TCPStore(
            address, port, None, True, limit, wait_for_workers=False, multi_tenant=True, master_listen_fd=descriptor
        )

    @override
    def get_backend(self) -> str:
        return RENDEZVOUS_BACKEND

    @override
    def next_rendezvous(self) -> RendezvousInfo:
        store = dist.PrefixStore(self.run_id, self._loopback_store)
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(self.master_addr, self.master_port))


def main() -> None:
    """Run torchrun with the arguments of this process; exit with 1 if a rank failed, 128 + n after signal n."""
    if "LOGLEVEL" not in os.environ:  # torchrun's own variable
        logging.disable(logging.ERROR)
    rendezvous_handler_registry.register(RENDEZVOUS_BACKEND, LoopbackRendezvous)
    threading.Thread(target=_forward_stop_signals, daemon=True, name="stop requests").start()
    try:
        run(parse_args(sys.argv[1:]))
    except SignalException as stop:
        sys.exit(128 + int(stop.sigval))
    except ChildFailedError as error:
        print_to_stderr(f"shoestring: {describe_rank_failure(error)}")
        sys.exit(_FAILURE)
    except (dist.DistError, OSError) as error:
        print_to_stderr(f"shoestring: the ranks of this machine could not be started: {error}")
        sys.exit(_FAILURE)


def describe_rank_failure(error: ChildFailedError) -> str:
    """Return one line on the rank that failed first and its exit code or signal."""
    rank, failure = error.get_first_failure()
    outcome = f"was killed by {failure.signal_name()}" if failure.exitcode < 0 else f"exited with {failure.exitcode}"
    others = len(error.failures) - 1
    return f"rank {rank} {outcome}" + (f", then {others} more on this machine" if others else "")


def _forward_stop_signals() -> None:
    """Create the stop file at each stop signal; the launcher has blocked these signals in this process."""
    path = os.environ.get(STOP_FILE_ENV_VAR)
    if path is None:
        return
    while True:
        signal.sigwait(STOP_SIGNALS)
        Path(path).touch()


if __name__ == "__main__":
    main()
