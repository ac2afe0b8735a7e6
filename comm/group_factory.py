"""Creation of process groups: one by one over gloo, by splits of the default group over NCCL."""

import copy
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from .communicator import Collectives, GlooCollectives


class GroupFactory(Protocol):
    """Creates groups from the ranks of the default group. Every rank creates every group, in the same order."""

    creation_calls: int
    """Number of group creations so far, the default group included; a split counts once."""

    def create_world_cpu(self, ranks: tuple[int, ...], world: Collectives | None) -> Collectives | None:
        """Return the communicator of all ranks for tensors on the host; `world` is that for tensors on the device."""
        ...

    def split_group(self, name: str, parts: Sequence[tuple[int, ...]], max_ctas: int | None) -> Collectives | None:
        """Create a group for each of the disjoint `parts`; return that of this rank, or None if it is in no part.

        `max_ctas` bounds the thread blocks of one operation on a GPU; None leaves the number to NCCL.
        """
        ...


def build_group_factory(device: torch.device, rank: int, timeout: timedelta) -> GroupFactory:
    """Return the group factory for a run on `device`."""
    return NcclGroupFactory(device, rank, timeout) if device.type == "cuda" else GlooGroupFactory(rank, timeout)


class GlooGroupFactory:
    """Creates gloo groups, for runs on CPUs. gloo cannot split, so each part is one `new_group`."""

    def __init__(self, rank: int, timeout: timedelta) -> None:
        """Take the `timeout` of an operation: a new group does not inherit that of the default group."""
        self.creation_calls = 1
        self._rank, self._limit = rank, timeout

    def create_world_cpu(self, ranks: tuple[int, ...], world: Collectives | None) -> Collectives | None:
        """See `GroupFactory`. On CPUs this is `world`."""
        return world

    def split_group(self, name: str, parts: Sequence[tuple[int, ...]], max_ctas: int | None) -> Collectives | None:
        """See `GroupFactory`."""
        local_group: Collectives | None = None
        # `new_group` is collective over the default group: every rank calls it for every part, also where it is none.
        for ranks in parts:
            self.creation_calls += 1
            handle = dist.new_group(list(ranks), timeout=self._limit)
            if self._rank in ranks:
                local_group = GlooCollectives(handle, ranks, self._rank, self._limit)
        return local_group


class NcclGroupFactory:
    """Creates NCCL groups by splitting the default group, which `init_default_process_group` has bound to a GPU.

    Not yet run on hardware.
    """

    def __init__(self, device: torch.device, rank: int, timeout: timedelta) -> None:
        self.creation_calls = 1
        self._device, self._rank, self._limit = device, rank, timeout

    def create_world_cpu(self, ranks: tuple[int, ...], world: Collectives | None) -> Collectives:
        """See `GroupFactory`. Return a gloo group."""
        self.creation_calls += 1
        # `TORCH_GLOO_LAZY_INIT` connects pairs at their first use: a full mesh of 2,048 ranks has 2,047 sockets per
        # rank.
        handle = dist.new_group(backend="gloo", timeout=self._limit)
        return GlooCollectives(handle, ranks, self._rank, self._limit)

    def split_group(self, name: str, parts: Sequence[tuple[int, ...]], max_ctas: int | None) -> Collectives | None:
        """See `GroupFactory`."""
        # The grid of 2,048 ranks has 2,377 groups, and each `new_group` over NCCL is a split, collective over all.
        # `split_group` creates all disjoint groups of one kind in one call: about 14 calls in place of 2,377.
        self.creation_calls += 1
        assert dist.group.WORLD is not None
        # A copy: the options belong to the default group, whose CTAs must not change.
        options: Any = copy.deepcopy(dist.group.WORLD._get_backend(self._device).options)
        if max_ctas is not None:
            options.config.max_ctas = max_ctas
        handle = dist.split_group(
            split_ranks=[list(ranks) for ranks in parts], timeout=self._limit, pg_options=options, group_desc=name
        )
        return None if handle is None else Collectives(handle)
