"""Ranks that another program has started find each other: torchrun of one's own, or a container's variables.

They wait for each other as machines do (`meeting.py`): a name that does not resolve is refused, what is waited for is
said, the wait has a limit, and a request to stop ends it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from ...comm.bootstrap import TorchrunEnvironment, connect_rendezvous_store
from ...comm.errors import raise_if_any
from .rendezvous import PeriodicMessage, master_address_problems

_SECONDS_BETWEEN_LOOKS = 0.2


class StoppedBeforeRendezvous(Exception):  # noqa: N818 -- says what happened
    """A request to stop came before the ranks had met; nothing was trained."""


def open_rendezvous_store(worker: TorchrunEnvironment, seconds: float, stop_asked: Callable[[], bool]) -> dist.Store:
    """Return the store at MASTER_ADDR:MASTER_PORT once every rank has come to it.

    Raises `ConfigError` where the address does not resolve, `dist.DistError` or `OSError` where ranks are not there in
    `seconds`, `StoppedBeforeRendezvous`.
    """
    raise_if_any(master_address_problems(os.environ["MASTER_ADDR"]))
    stores: list[dist.Store] = []
    errors: list[dist.DistError | OSError] = []

    def open_it() -> None:
        try:
            stores.append(connect_rendezvous_store(worker, timedelta(seconds=seconds)))
        except (dist.DistError, OSError) as error:
            errors.append(error)

    # torch waits outside Python, where no signal is heard: so it does in a thread of its own
    opening = threading.Thread(target=open_it, daemon=True, name="ranks meet")
    opening.start()
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    words = PeriodicMessage(first_after=_SECONDS_BETWEEN_LOOKS)
    while opening.is_alive():
        if stop_asked():
            raise StoppedBeforeRendezvous(f"stopped before the {worker.world_size} ranks had met at {where}")
        if worker.local_rank == 0:
            others = worker.world_size - 1
            words.print_if_due(
                f"rank {worker.rank} waits for {others} other rank{'s' if others > 1 else ''} at {where}"
            )
        opening.join(_SECONDS_BETWEEN_LOOKS)
    if errors:
        raise errors[0]
    return stores[0]
