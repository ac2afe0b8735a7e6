"""From torchrun's environment variables to a default process group that survives torchrun's restarts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from .errors import ConfigError, Problem, raise_if_any
from .loopback import open_listening_socket, resolve_to_loopback

_MOST_RANKS = 10_000_000


@dataclass(frozen=True)
class TorchrunEnvironment:
    """What torchrun tells each worker."""

    rank: int
    local_rank: int
    world_size: int

    @staticmethod
    def read() -> TorchrunEnvironment | None:
        """The variables of this process, or None outside torchrun. Raises `ConfigError` where some are missing."""
        wanted = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in wanted if name not in os.environ]
        if "RANK" in missing:
            return None
        if missing:
            hint = f"is set but {', '.join(missing)} is not; start ranks with torchrun, or unset it"
            raise ConfigError([Problem("RANK", os.environ["RANK"], hint)])
        problems: list[Problem] = []
        size = _whole("WORLD_SIZE", 1, _MOST_RANKS, problems)
        rank = _whole("RANK", 0, _MOST_RANKS, problems)
        local_rank = _whole("LOCAL_RANK", 0, _MOST_RANKS, problems) if "LOCAL_RANK" in os.environ else 0
        if "LOCAL_WORLD_SIZE" in os.environ:
            _whole("LOCAL_WORLD_SIZE", 1, _MOST_RANKS, problems)
        _whole("MASTER_PORT", 1, 65535, problems)
        if not os.environ["MASTER_ADDR"]:
            problems.append(Problem("MASTER_ADDR", "", "must name the machine of rank 0"))
        if not problems and rank >= size:
            problems.append(Problem("RANK", rank, f"must be less than WORLD_SIZE = {size}: ranks count from 0"))
        raise_if_any(problems)
        return TorchrunEnvironment(rank=rank, local_rank=local_rank, world_size=size)


def _whole(name: str, low: int, high: int, problems: list[Problem]) -> int:
    """The number in a variable of the environment; `low`, and a problem more, where there is none."""
    text = os.environ[name]
    if text.isascii() and text.isdecimal() and len(text) <= len(str(high)) and low <= int(text) <= high:
        return int(text)
    hint = f"must be a whole number from {low} to {high}; start ranks with torchrun, or unset RANK"
    problems.append(Problem(name, text, hint))
    return low


def connect_rendezvous_store(worker: TorchrunEnvironment, timeout: timedelta) -> dist.Store:
    """Meet the other ranks at the store of the launch. Raises `dist.DistError` where they do not come in time.

    torchrun keeps one store over its restarts, and gloo reads the addresses of dead workers from it.
    A prefix for each attempt keeps the lives apart.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_master = worker.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address = resolve_to_loopback(host) if is_master else None
    descriptor = None if address is None else open_listening_socket(address, port).detach()
    store = dist.TCPStore(host, port, worker.world_size, is_master, timeout, master_listen_fd=descriptor)
    return dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def init_default_process_group(
    worker: TorchrunEnvironment, device: torch.device, timeout: timedelta, store: dist.Store | None = None
) -> None:
    """Open the default process group: NCCL where `device` is a GPU, gloo elsewhere.

    Ranks meet at `store`, by default a new one (see `connect_rendezvous_store`).
    """
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        store=connect_rendezvous_store(worker, timeout) if store is None else store,
        rank=worker.rank,
        world_size=worker.world_size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
