"""What a checkpoint is made of: pieces of tensors whose names and shapes depend on no layout.

An expert is a tensor of its own, by its number in the whole layer. A piece is a tensor, or a run of its flattened
elements, as an optimizer that is sharded holds them. Where several ranks hold the same piece, one of them writes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

MODEL_STATE = "model"
"""Parameters, in the precision that the optimizer updates, and routing biases."""
EXP_AVG, EXP_AVG_SQ = "exp_avg", "exp_avg_sq"
EMA_STATE = "average"
"""The moving average of the parameters, where there is one."""
RNG_STATE = "rng"


@dataclass(frozen=True)
class StateSlice:
    """State that belongs to one parameter, as an optimizer hands it over: a run of the flattened parameter."""

    kind: str
    """A name such as `model` or `exp_avg`."""
    parameter: str
    element_offset: int
    """Its first element in the parameter as this rank holds it, a stack of experts or whole."""
    flat: Tensor
    """No other rank holds it."""


@dataclass(frozen=True)
class TensorPiece:
    """A run of the flattened elements of the tensor `name`."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    element_offset: int
    """Its first element."""
    flat: Tensor
    """One-dimensional; a view of the live state, so that filling it changes the model."""
    replica_ranks: tuple[int, ...]
    """All that hold the same, ascending."""

    @property
    def nbytes(self) -> int:
        """Of its elements."""
        return self.flat.numel() * self.flat.element_size()

    @property
    def file_key(self) -> str:
        """Its name in a file."""
        end = self.element_offset + self.flat.numel()
        return self.name if self.is_whole_tensor else f"{self.name}[{self.element_offset}:{end}]"

    @property
    def is_whole_tensor(self) -> bool:
        """Whether it is the tensor."""
        return self.flat.numel() == math.prod(self.shape)


def expert_tensor_name(parameter: str, expert: int) -> str:
    """What one expert's share of a stacked parameter is called; `expert` is its number in the whole layer."""
    return f"{parameter}/expert_{expert:04d}"


def whole_tensor_pieces(name: str, tensor: Tensor, ranks: tuple[int, ...]) -> Iterator[TensorPiece]:
    """A tensor of which no part has a name of its own."""
    yield TensorPiece(name, tuple(tensor.shape), 0, tensor.detach().view(-1), ranks)


def pieces_of_slice(
    part: StateSlice, shape: tuple[int, ...], first_expert: int | None, rank: int
) -> Iterator[TensorPiece]:
    """`part`, which `rank` holds, under its canonical names.

    `shape` is the parameter's on this rank. Its first dimension counts experts from `first_expert` on, unless that is
    None: then the run is cut where an expert ends.
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
    """Those of `pieces`, all that `rank` holds, that it writes: ranks with the same pieces share them by bytes.

    They agree without a word: each of them sees the same pieces in the same order.
    """
    loads: dict[tuple[int, ...], list[int]] = {}
    own = []
    for piece in sorted(pieces, key=lambda piece: (piece.name, piece.element_offset)):
        load = loads.setdefault(piece.replica_ranks, [0] * len(piece.replica_ranks))
        lightest = load.index(min(load))
        load[lightest] += piece.nbytes
        if piece.replica_ranks[lightest] == rank:
            own.append(piece)
    return own
