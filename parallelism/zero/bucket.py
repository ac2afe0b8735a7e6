"""Parameters that are reduced together, in flat buffers: weights and gradients whole, all else one shard a rank.

Letters: N elements of a bucket, G ranks that share it, n = N / G elements of one shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...comm.groups import Group

_ALIGNMENT = 64  # elements: 128 bytes in BF16, so that a weight may be the operand of any kernel


@dataclass(frozen=True)
class BucketParameter:
    """A parameter on its way into a bucket."""

    name: str
    parameter: Tensor
    """A leaf. It becomes a view of the bucket, and so does its gradient."""
    has_weight_decay: bool
    """Whether weight decay is for it."""


@dataclass(frozen=True)
class ParameterRange:
    """Where a parameter lies in its bucket."""

    name: str
    parameter: Tensor
    begin: int
    end: int


@dataclass(frozen=True)
class ParameterShard:
    """The part of one parameter whose optimizer state this rank holds: a stretch of the flattened parameter.

    All tensors are views of [length]: writing into them changes the state. Over the ranks that hold a parameter these
    stretches meet without overlap, so that a file of whole parameters can be written from them and read into others.
    """

    name: str
    """Of the parameter in the model; of experts, this rank's share of them: see `Model.first_local_expert`."""
    shape: torch.Size
    """Of the whole parameter on this rank."""
    offset: int
    """Of the stretch's first element in the flattened parameter."""
    slice_in_bucket_shard: slice
    """Where the stretch lies in this rank's shard of the bucket."""
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class Bucket:
    """Some parameters of one rank, all with replicas on the same ranks and final at the same moment.

    ZeRO-1 (arXiv 1910.02054): each rank of the group owns one shard of the master weights and moments, an equal part
    of the flat buffer wherever that cuts a parameter. `weights_N` has the parameters' own dtype, `grads_N` and the
    masters are FP32 at least, the moments have the dtype that they are given. Bytes a parameter with BF16 weights
    and moments: 2 + 4 + (4 + 4) / G.
    """

    def __init__(
        self,
        name: str,
        parameters: Sequence[BucketParameter],
        group: Group,
        moments_dtype: torch.dtype,
        weights_dtype: torch.dtype,
    ) -> None:
        """`members` must be equal on all ranks of `group`. `weights` is the dtype they are kept in from here on.

        The masters keep what the parameters hold now, at full width.
        """
        ordered = _in_order(parameters)
        wide = torch.promote_types(ordered[0].parameter.dtype, torch.float32)
        device = ordered[0].parameter.device
        self.name, self.group = name, group
        self.parameter_ranges = tuple(_extents(ordered))
        self.weight_decay_end = max(
            (e.end for e, m in zip(self.parameter_ranges, ordered, strict=True) if m.has_weight_decay), default=0
        )
        """Elements from here on have no weight decay."""
        length = padded_bucket_length(ordered, group.size)
        self.shard_size = length // group.size
        self.shard_begin = group.group_rank * self.shard_size
        """Of this rank's shard in the buffer."""
        self.weights_N = torch.zeros(length, dtype=weights_dtype, device=device)
        self.grads_N = torch.zeros(length, dtype=wide, device=device)
        self.weights_GN = self.weights_N.view(group.size, self.shard_size)
        self.grads_GN = self.grads_N.view(group.size, self.shard_size)
        """By the rank that owns them, [G, n]."""
        masters_N = self.weights_N if weights_dtype == wide else torch.zeros(length, dtype=wide, device=device)
        for extent in self.parameter_ranges:
            masters_N[extent.begin : extent.end] = extent.parameter.detach().flatten()
        # Where weights are as wide as masters, the rank's shard of them is its master.
        self.master_n = self._own(masters_N) if weights_dtype == wide else self._own(masters_N).clone()
        self.exp_avg_n = torch.zeros(self.shard_size, dtype=moments_dtype, device=device)
        self.exp_avg_sq_n = torch.zeros(self.shard_size, dtype=moments_dtype, device=device)
        self.weights_N.copy_(masters_N)
        for extent in self.parameter_ranges:
            self._become_views(extent)

    @property
    def grad_n(self) -> Tensor:
        """The gradients of this rank's shard: of the whole group once they are reduced."""
        return self._own(self.grads_N)

    def slices_by_weight_decay(self) -> Iterator[tuple[slice, bool]]:
        """The parts of this rank's shard with weight decay and without."""
        border = min(max(self.weight_decay_end - self.shard_begin, 0), self.shard_size)
        yield from (
            (part, decays) for part, decays in ((slice(0, border), True), (slice(border, self.shard_size), False))
        )

    def cast_masters_to_weights(self) -> None:
        """Round this rank's shard of the masters to the weights."""
        if self.master_n.dtype != self.weights_N.dtype:  # else they are the weights
            self._own(self.weights_N).copy_(self.master_n)

    def local_shards(self) -> Iterator[ParameterShard]:
        """What this rank holds, parameter by parameter."""
        end = self.shard_begin + self.shard_size
        for extent in self.parameter_ranges:
            first, last = max(extent.begin, self.shard_begin), min(extent.end, end)
            if first < last:
                part = slice(first - self.shard_begin, last - self.shard_begin)
                yield ParameterShard(
                    name=extent.name,
                    shape=extent.parameter.shape,
                    offset=first - extent.begin,
                    slice_in_bucket_shard=part,
                    master=self.master_n[part],
                    exp_avg=self.exp_avg_n[part],
                    exp_avg_sq=self.exp_avg_sq_n[part],
                )

    def _own(self, flat_N: Tensor) -> Tensor:
        return flat_N[self.shard_begin : self.shard_begin + self.shard_size]

    def _become_views(self, extent: ParameterRange) -> None:
        parameter = extent.parameter
        parameter.data = self.weights_N[extent.begin : extent.end].view(parameter.shape)
        parameter.grad_dtype = self.grads_N.dtype
        parameter.grad = self.grads_N[extent.begin : extent.end].view(parameter.shape)


def padded_bucket_length(parameters: Sequence[BucketParameter], ranks: int) -> int:
    """N: elements of a bucket of these over so many ranks."""
    *_, last = _extents(_in_order(parameters))
    return _rounded_up(last.end, _ALIGNMENT * ranks)


def _in_order(members: Sequence[BucketParameter]) -> list[BucketParameter]:
    """Those with weight decay first."""
    return sorted(members, key=lambda member: not member.has_weight_decay)


def _extents(members: Sequence[BucketParameter]) -> Iterator[ParameterRange]:
    begin = 0
    for member in members:
        end = begin + member.parameter.numel()
        yield ParameterRange(member.name, member.parameter, begin, end)
        begin = _rounded_up(end, _ALIGNMENT)


def _rounded_up(length: int, step: int) -> int:
    return -(-length // step) * step
