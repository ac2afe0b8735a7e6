"""Start of a rank: torchrun's environment variables, the rendezvous store, the default process group."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from .errors import ConfigError, Problem, raise_if_any
from .loopback import open_listening_socket, resolve_to_loopback

_MOST_RANKS = 10_000_000
_HINT = "; start ranks with torchrun, or unset RANK"


@dataclass(frozen=True)
class TorchrunEnvironment:
    """Ranks and world size from torchrun's environment variables."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int = 1
    """Ranks on this machine."""

    @staticmethod
    def read() -> "TorchrunEnvironment | None":
        """Read this process's variables; None outside torchrun. Raises `ConfigError` where some are missing."""
        wanted = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in wanted if name not in os.environ]
        if "RANK" in missing:
            return None
        if missing:
            hint = f"is set but {', '.join(missing)} is not; start ranks with torchrun, or unset it"
            raise ConfigError([Problem("RANK", os.environ["RANK"], hint)])
        problems: list[Problem] = []

        def whole(name: str, default: str, low: int, high: int = _MOST_RANKS) -> int:
            return read_whole_number(name, os.environ.get(name, default), low, high, problems, _HINT)

        size, rank = whole("WORLD_SIZE", "", 1), whole("RANK", "", 0)
        local_rank, local_size = whole("LOCAL_RANK", "0", 0), whole("LOCAL_WORLD_SIZE", "1", 1)
        whole("MASTER_PORT", "", 1, 65535)
        if not os.environ["MASTER_ADDR"]:
            problems.append(Problem("MASTER_ADDR", "", "must name the node of rank 0"))
        if not problems and rank >= size:
            problems.append(Problem("RANK", rank, f"must be less than WORLD_SIZE = {size}: ranks count from 0"))
        raise_if_any(problems)
        return TorchrunEnvironment(rank, local_rank, size, local_size)


def read_whole_number(name: str, text: str, low: int, high: int, problems: list[Problem], hint: str = "") -> int:
    """Return the number in `text`, the value of variable `name`; for another text add a problem and return `low`."""
    # `int` alone would take "+1", "1_0" and other digits than 0 to 9, and a text of millions of digits takes long.
    if text.isascii() and text.isdecimal() and len(text) <= len(str(high)) and low <= int(text) <= high:
        return int(text)
    problems.append(Problem(name, text, f"must be a whole number from {low} to {high}{hint}"))
    return low


def connect_rendezvous_store(worker: TorchrunEnvironment, timeout: timedelta) -> dist.Store:
    """Connect to the rendezvous store of the launch. Raises `dist.DistError` if the other ranks do not come in time."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun sets the variable where its agent serves the store already; a second server could not bind the port.
    is_master = worker.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    # A TCPStore listens on all interfaces. If the address is a loopback one, other machines must not reach the store.
    address = resolve_to_loopback(host) if is_master else None
    descriptor = None if address is None else open_listening_socket(address, port).detach()
    store = dist.TCPStore(host, port, worker.world_size, is_master, timeout, master_listen_fd=descriptor)
    # torchrun keeps one store over its restarts, where gloo would read the addresses of dead workers: one prefix for
    # each restart keeps them apart.
    return dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def init_default_process_group(
    worker: TorchrunEnvironment, device: torch.device, timeout: timedelta, store: dist.Store | None = None
) -> None:
    """Initialize the default process group: NCCL where `device` is a GPU, gloo elsewhere.

    `store` defaults to that of `connect_rendezvous_store`.
    """
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        store=connect_rendezvous_store(worker, timeout) if store is None else store,
        rank=worker.rank,
        world_size=worker.world_size,
        timeout=timeout,
        # Binds the communicator to this GPU, without which `split_group` cannot split it.
        device_id=device if device.type == "cuda" else None,
    )
