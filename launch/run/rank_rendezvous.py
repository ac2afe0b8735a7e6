"""Rendezvous of ranks that the user's torchrun, or a container with torchrun's variables, has started.

As in the rendezvous of nodes (`rendezvous.py`), a name that does not resolve is an error, a message says what the rank
waits for, the wait has a limit, and a stop signal ends it.
"""

import os
import threading
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from ...comm.bootstrap import TorchrunEnvironment, connect_rendezvous_store
from ...comm.errors import raise_if_any
from .node_connection import PeriodicMessage
from .rendezvous import master_address_problems

_POLL_SECONDS = 0.2


class StoppedBeforeRendezvous(Exception):  # noqa: N818 -- says what happened
    """A stop was requested before all ranks had connected; nothing was trained."""


def open_rendezvous_store(
    worker: TorchrunEnvironment, seconds: float, stop_requested: Callable[[], bool]
) -> dist.Store:
    """Return the store at MASTER_ADDR:MASTER_PORT once every rank has connected to it.

    Raises `ConfigError` if the address does not resolve, `dist.DistError` or `OSError` if ranks do not connect within
    `seconds`, and `StoppedBeforeRendezvous`.
    """
    raise_if_any(master_address_problems(os.environ["MASTER_ADDR"]))
    stores: list[dist.Store] = []
    errors: list[dist.DistError | OSError] = []

    def open_it() -> None:
        try:
            stores.append(connect_rendezvous_store(worker, timedelta(seconds=seconds)))
        except (dist.DistError, OSError) as error:
            errors.append(error)

    # torch waits in C++, where Python handles no signal, so the wait is in another thread.
    opening = threading.Thread(target=open_it, daemon=True, name="rendezvous")
    opening.start()
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    message = PeriodicMessage(first_after=_POLL_SECONDS)
    while opening.is_alive():
        if stop_requested():
            raise StoppedBeforeRendezvous(f"stopped before all {worker.world_size} ranks had connected at {where}")
        if worker.local_rank == 0:
            others = worker.world_size - 1
            message.print_if_due(
                f"rank {worker.rank} waits for {others} other rank{'s' if others > 1 else ''} at {where}"
            )
        opening.join(_POLL_SECONDS)
    if errors:
        raise errors[0]
    return stores[0]
