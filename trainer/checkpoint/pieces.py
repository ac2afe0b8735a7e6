"""Pieces of a checkpoint's tensors, whose names and shapes do not depend on the parallel layout.

Each expert is a separate tensor, named by its number in the whole layer. A piece is a tensor or a contiguous range of
its flattened elements, as a sharded optimizer holds it. If several ranks hold the same piece, one of them writes it.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from .tensor_file import TensorSpec

MODEL_STATE = "model"
"""Master parameters and routing biases."""
EXP_AVG, EXP_AVG_SQ = "exp_avg", "exp_avg_sq"
EMA_STATE = "average"
"""Moving average of the parameters, if the run keeps one."""
RNG_STATE = "rng"


@dataclass(frozen=True)
class StateSlice:
    """Contiguous range of one parameter's flattened state, as the optimizer holds it."""

    kind: str
    """Kind of state: `model`, `exp_avg`, `exp_avg_sq` or `average`."""
    parameter: str
    element_offset: int
    """First element in the parameter as this rank holds it, which may be a stack of experts."""
    flat: Tensor
    """Elements [n]; held by no other rank."""


@dataclass(frozen=True)
class TensorPiece:
    """Contiguous range of the flattened elements of tensor `name`."""

    name: str
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    element_offset: int
    """First element in the flattened tensor."""
    flat: Tensor
    """Elements [n], a view of the live state: filling it changes the model."""
    replica_ranks: tuple[int, ...]
    """Ranks that hold the same piece, ascending."""

    @property
    def nbytes(self) -> int:
        """Bytes of the piece."""
        return self.flat.numel() * self.flat.element_size()

    @property
    def whole(self) -> TensorSpec:
        """Name, dtype and shape of the whole tensor."""
        return TensorSpec(self.name, self.flat.dtype, self.shape)

    @property
    def in_file(self) -> TensorSpec:
        """Name, dtype and shape of the piece in a tensor file."""
        return piece_in_file(self.whole, self.element_offset, self.flat.numel())


def piece_in_file(whole: TensorSpec, element_offset: int, num_elements: int) -> TensorSpec:
    """Return how a tensor file holds a range of a tensor's elements: flat and named by the range, unless it is all."""
    if num_elements == math.prod(whole.shape):
        return whole
    name = f"{whole.name}[{element_offset}:{element_offset + num_elements}]"
    return TensorSpec(name, whole.dtype, (num_elements,))


def expert_tensor_name(parameter: str, expert: int) -> str:
    """Return the name of one expert's tensor; `expert` is its number in the whole layer."""
    return f"{parameter}/expert_{expert:04d}"


def whole_tensor_pieces(name: str, tensor: Tensor, ranks: tuple[int, ...]) -> Iterator[TensorPiece]:
    """Yield the one piece of a tensor that is not split."""
    yield TensorPiece(name, tuple(tensor.shape), 0, tensor.detach().view(-1), ranks)


def pieces_of_slice(
    part: StateSlice, shape: tuple[int, ...], first_expert: int | None, rank: int
) -> Iterator[TensorPiece]:
    """Yield the pieces of `part`, held by `rank`, under their canonical names.

    `shape` is the parameter's shape on this rank. If `first_expert` is not None, its first dimension counts experts
    from that number on, and the range is split where an expert ends.
    """
    flat, name = part.flat, f"{part.kind}/{part.parameter}"
    if first_expert is None:
        yield TensorPiece(name, shape, part.element_offset, flat, (rank,))
        return
    size, end = math.prod(shape[1:]), part.element_offset + flat.numel()
    for index in range(part.element_offset // size, -(-end // size)):
        begin, stop = max(part.element_offset, index * size), min(end, (index + 1) * size)
        share = flat[begin - part.element_offset : stop - part.element_offset]
        yield TensorPiece(
            expert_tensor_name(name, first_expert + index), shape[1:], begin - index * size, share, (rank,)
        )


def pieces_to_write(rank: int, pieces: Iterable[TensorPiece]) -> list[TensorPiece]:
    """Return those of `pieces` (all that `rank` holds) that `rank` writes: replicas divide their bytes evenly."""
    # No communication: all replicas see the same pieces in the same order and make the same choice.
    loads: dict[tuple[int, ...], list[int]] = {}
    written = []
    for piece in sorted(pieces, key=lambda piece: (piece.name, piece.element_offset)):
        load = loads.setdefault(piece.replica_ranks, [0] * len(piece.replica_ranks))
        lightest = load.index(min(load))
        load[lightest] += piece.nbytes
        if piece.replica_ranks[lightest] == rank:
            written.append(piece)
    return written
