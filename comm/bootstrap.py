"""From torchrun's environment variables to a default process group that survives torchrun's restarts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from .refusal import Problem, Refused


@dataclass(frozen=True)
class WorkerEnvironment:
    """What torchrun tells each worker."""

    rank: int
    local_rank: int
    world_size: int

    @staticmethod
    def read() -> WorkerEnvironment | None:
        """The variables of this process, or None outside torchrun. Raises `Refused` where some are missing."""
        wanted = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in wanted if name not in os.environ]
        if "RANK" in missing:
            return None
        if missing:
            remedy = f"is set but {', '.join(missing)} is not; start ranks with torchrun, or unset it"
            raise Refused([Problem("RANK", os.environ["RANK"], remedy)])
        return WorkerEnvironment(
            rank=int(os.environ["RANK"]),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            world_size=int(os.environ["WORLD_SIZE"]),
        )


def start_default_group(worker: WorkerEnvironment, device: torch.device, timeout: timedelta) -> None:
    """Open the default process group: NCCL where `device` is a GPU, gloo elsewhere.

    torchrun keeps one store over its restarts, and gloo reads the addresses of dead workers from it.
    A prefix for each attempt keeps the lives apart.
    """
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        worker.world_size,
        is_master=worker.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        timeout=timeout,
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(f"attempt_{attempt}", store),
        rank=worker.rank,
        world_size=worker.world_size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
