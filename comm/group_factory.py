"""Making process groups: over gloo one by one, over NCCL all groups of a kind by one split.

At 2048 ranks the grid has 2,377 groups. `new_group` is a call for each of them, and over NCCL each call is collective
over all ranks; `split_group` makes all disjoint groups of a kind at once, so that about 14 calls are enough.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from .communicator import Collectives, GlooCollectives, NcclCollectives


class GroupFactory(Protocol):
    """Makes groups over the ranks of the default group. Every rank makes every group, in the same order."""

    creation_calls: int
    """How many process groups have been created, the default one included; a split counts once."""

    def create_world(self, ranks: tuple[int, ...]) -> Collectives:
        """Return the communicator of all ranks, for tensors on the device."""
        ...

    def create_world_cpu(self, ranks: tuple[int, ...]) -> Collectives:
        """Return the communicator of all ranks, for tensors on the host."""
        ...

    def split_group(self, name: str, parts: Sequence[tuple[int, ...]], max_ctas: int | None) -> Collectives | None:
        """Make a group of each of the disjoint `parts`; return that of this rank, or None where it is in no part.

        `max_ctas` is the most thread blocks that one of its operations occupies on a GPU; None leaves it to NCCL.
        """
        ...


def build_group_factory(device: torch.device, rank: int, timeout: timedelta) -> GroupFactory:
    """Return what makes the groups of a run that computes on `device`."""
    return NcclGroupFactory(device, rank, timeout) if device.type == "cuda" else GlooGroupFactory(rank, timeout)


class GlooGroupFactory:
    """Over gloo, for runs on CPUs: gloo cannot split, so each part is a `new_group`."""

    def __init__(self, rank: int, timeout: timedelta) -> None:
        """`limit` is how long an operation may take: a new group does not inherit the default group's."""
        self.creation_calls = 1
        self._rank, self._limit = rank, timeout
        self._everyone: Collectives | None = None

    def create_world(self, ranks: tuple[int, ...]) -> Collectives:
        """See `GroupFactory`."""
        if self._everyone is None:
            self._everyone = self.split_group("world", [ranks], None)
        assert self._everyone is not None
        return self._everyone

    def create_world_cpu(self, ranks: tuple[int, ...]) -> Collectives:
        """See `GroupFactory`: the same, for tensors of a run on CPUs are on the host."""
        return self.create_world(ranks)

    def split_group(self, name: str, parts: Sequence[tuple[int, ...]], max_ctas: int | None) -> Collectives | None:
        """See `GroupFactory`."""
        own: Collectives | None = None
        for ranks in parts:
            self.creation_calls += 1
            handle = dist.new_group(list(ranks), timeout=self._limit)
            if self._rank in ranks:
                own = GlooCollectives(handle, ranks, self._rank, self._limit)
        return own


class NcclGroupFactory:
    """Over NCCL, by splits of the default group, which `start_default_group` has bound to a GPU.

    Not yet run on hardware.
    """

    def __init__(self, device: torch.device, rank: int, timeout: timedelta) -> None:
        self.creation_calls = 1
        self._device, self._rank, self._limit = device, rank, timeout

    def create_world(self, ranks: tuple[int, ...]) -> Collectives:
        """See `GroupFactory`: a split like the others, because the default group has the longer limit of a start."""
        communicator = self.split_group("world", [ranks], None)
        assert communicator is not None
        return communicator

    def create_world_cpu(self, ranks: tuple[int, ...]) -> Collectives:
        """See `GroupFactory`: a gloo group. Its pairs connect when they are used first (`TORCH_GLOO_LAZY_INIT`)."""
        self.creation_calls += 1
        handle = dist.new_group(backend="gloo", timeout=self._limit)
        return GlooCollectives(handle, ranks, self._rank, self._limit)

    def split_group(self, name: str, parts: Sequence[tuple[int, ...]], max_ctas: int | None) -> Collectives | None:
        """See `GroupFactory`."""
        self.creation_calls += 1
        assert dist.group.WORLD is not None
        options: Any = copy.deepcopy(dist.group.WORLD._get_backend(self._device).options)
        if max_ctas is not None:
            options.config.max_ctas = max_ctas
        handle = dist.split_group(
            split_ranks=[list(ranks) for ranks in parts], timeout=self._limit, pg_options=options, group_desc=name
        )
        return None if handle is None else NcclCollectives(handle)
