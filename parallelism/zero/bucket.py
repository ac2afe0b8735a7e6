"""Buckets: parameters that are reduced together. Weights and gradients are whole flat buffers, all else is sharded.

Letters: N elements of a bucket, G ranks that share it, n = N / G elements of one shard.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...comm.groups import Group
from ...comm.units import round_up

_ALIGNMENT = 64  # elements: 128 bytes in BF16, so that a weight may be the operand of any kernel


@dataclass(frozen=True)
class BucketParameter:
    """A parameter to put into a bucket."""

    name: str
    parameter: Tensor
    """A leaf tensor. It and its gradient become views of the bucket."""
    has_weight_decay: bool
    """True if weight decay applies to it."""


@dataclass(frozen=True)
class ParameterRange(BucketParameter):
    """Range of a parameter in its bucket."""

    begin: int
    end: int


@dataclass(frozen=True)
class ParameterShard:
    """Part of one flattened parameter whose optimizer state this rank holds.

    All tensors are views [length]: writing into them changes the state. The shards of a parameter on all ranks cover it
    without overlap, so that checkpoints can be written and read in any layout.
    """

    name: str
    """Name of the parameter in the model; for experts see `Model.first_local_expert`."""
    shape: torch.Size
    """Shape of the whole parameter on this rank."""
    offset: int
    """Index of the first element in the flattened parameter."""
    slice_in_bucket_shard: slice
    """Position in this rank's shard of the bucket."""
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class Bucket:
    """Parameters of one rank with the same replicas, whose gradients become final at the same instruction.

    ZeRO-1 (arXiv 1910.02054): each rank of the group holds one shard of the master weights and moments, an equal part
    of the flat buffer. `weights_N` has the weights' dtype; `grads_N` and the masters are FP32 at least. Bytes per
    parameter with BF16 weights and moments: 2 + 4 + (4 + 4) / G.
    """

    def __init__(
        self,
        name: str,
        parameters: Sequence[BucketParameter],
        group: Group,
        moments_dtype: torch.dtype,
        weights_dtype: torch.dtype,
    ) -> None:
        """Copy `parameters`, which are equal on all ranks of `group`, into masters and weights of `weights_dtype`."""
        # Shards are equal parts of the buffer, wherever they cut a parameter: every rank updates and sends as much as
        # the others.
        ordered = sorted(parameters, key=lambda parameter: not parameter.has_weight_decay)
        wide = torch.promote_types(ordered[0].parameter.dtype, torch.float32)
        device = ordered[0].parameter.device
        self.name, self.group = name, group
        self.parameter_ranges = tuple(_parameter_ranges(ordered))
        self.weight_decay_end = max((each.end for each in self.parameter_ranges if each.has_weight_decay), default=0)
        """First element without weight decay."""
        length = padded_bucket_length((each.parameter.numel() for each in ordered), group.size)
        self.shard_size = length // group.size
        self.shard_begin = group.group_rank * self.shard_size
        """First element of this rank's shard in the buffer."""
        self.weights_N = torch.zeros(length, dtype=weights_dtype, device=device)
        self.grads_N = torch.zeros(length, dtype=wide, device=device)
        self.weights_GN = self.weights_N.view(group.size, self.shard_size)
        self.grads_GN = self.grads_N.view(group.size, self.shard_size)
        """Gradients by the rank whose shard they are, [G, n]."""
        masters_N = self.weights_N if weights_dtype == wide else torch.zeros(length, dtype=wide, device=device)
        for parameter_range in self.parameter_ranges:
            masters_N[parameter_range.begin : parameter_range.end] = parameter_range.parameter.detach().flatten()
        # With weights as wide as masters, the local shard of the weights is the master: a copy would cost 4 bytes per
        # element of the shard.
        self.master_n = self._local_shard(masters_N) if weights_dtype == wide else self._local_shard(masters_N).clone()
        self.exp_avg_n = torch.zeros(self.shard_size, dtype=moments_dtype, device=device)
        self.exp_avg_sq_n = torch.zeros(self.shard_size, dtype=moments_dtype, device=device)
        self.weights_N.copy_(masters_N)
        for parameter_range in self.parameter_ranges:
            self._replace_by_views(parameter_range)

    @property
    def grad_n(self) -> Tensor:
        """Gradients of this rank's shard, summed over the group after the reduction."""
        return self._local_shard(self.grads_N)

    def slices_by_weight_decay(self) -> Iterator[tuple[slice, bool]]:
        """Yield the slices of this rank's shard with and without weight decay."""
        # At most two slices, because parameters with weight decay come first: the update is two calls per bucket.
        border = min(max(self.weight_decay_end - self.shard_begin, 0), self.shard_size)
        yield slice(0, border), True
        yield slice(border, self.shard_size), False

    def cast_masters_to_weights(self) -> None:
        """Cast this rank's shard of the masters to the weights' dtype."""
        if self.master_n.dtype != self.weights_N.dtype:  # else they are the same memory
            self._local_shard(self.weights_N).copy_(self.master_n)

    def local_shards(self) -> Iterator[ParameterShard]:
        """Yield the shard of each parameter that this rank holds."""
        end = self.shard_begin + self.shard_size
        for parameter_range in self.parameter_ranges:
            first, last = max(parameter_range.begin, self.shard_begin), min(parameter_range.end, end)
            if first < last:
                part = slice(first - self.shard_begin, last - self.shard_begin)
                yield ParameterShard(
                    name=parameter_range.name,
                    shape=parameter_range.parameter.shape,
                    offset=first - parameter_range.begin,
                    slice_in_bucket_shard=part,
                    master=self.master_n[part],
                    exp_avg=self.exp_avg_n[part],
                    exp_avg_sq=self.exp_avg_sq_n[part],
                )

    def _local_shard(self, flat_N: Tensor) -> Tensor:
        return flat_N[self.shard_begin : self.shard_begin + self.shard_size]

    def _replace_by_views(self, parameter_range: ParameterRange) -> None:
        parameter = parameter_range.parameter
        parameter.data = self.weights_N[parameter_range.begin : parameter_range.end].view(parameter.shape)
        parameter.grad_dtype = self.grads_N.dtype
        parameter.grad = self.grads_N[parameter_range.begin : parameter_range.end].view(parameter.shape)


def padded_bucket_length(lengths: Iterable[int], ranks: int) -> int:
    """Return N, the elements of a bucket of parameters with `lengths` elements over `ranks` ranks, with padding."""
    # Every shard is a multiple of the alignment, so that its tensors can be operands of any kernel too.
    return round_up(sum(round_up(length, _ALIGNMENT) for length in lengths), _ALIGNMENT * ranks)


def _parameter_ranges(parameters: Sequence[BucketParameter]) -> Iterator[ParameterRange]:
    begin = 0
    for parameter in parameters:
        end = begin + parameter.parameter.numel()
        yield ParameterRange(parameter.name, parameter.parameter, parameter.has_weight_decay, begin, end)
        begin = round_up(end, _ALIGNMENT)
