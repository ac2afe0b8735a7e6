"""The training state of one rank as pieces under canonical names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from ...comm.groups import ProcessGroups
from ..model.config import ModelConfig
from ..model.model import Model
from ..stages import Stages
from .pieces import MODEL, RNG, Part, Piece, part_pieces, whole_pieces

BIAS = ".router.bias_E"

Holders = Callable[[str], tuple[int, ...]]
"""Name of a parameter or buffer to the ranks that hold it, ascending."""


def state_pieces(model: Model, parts: Iterable[Part], holders: Holders, rank: int) -> Iterator[Piece]:
    """`parts`, the state of this rank's parameters, and what no optimizer knows of: the routing biases.

    See `trainer/optimizer/adamw.py` for the parts.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    experts = model.expert_parameter_names()
    for part in parts:
        first_expert = model.first_expert if part.parameter in experts else None
        ranks = (rank,) if part.is_slice else holders(part.parameter)
        yield from part_pieces(part, shapes[part.parameter], first_expert, ranks)
    for name, buffer in model.named_buffers():
        yield from whole_pieces(f"{MODEL}/{name}", buffer, holders(name))


def model_pieces(model: Model, holders: Holders, rank: int) -> Iterator[Piece]:
    """The weights and routing biases alone."""
    parts = (Part(MODEL, name, parameter) for name, parameter in model.named_parameters())
    return state_pieces(model, parts, holders, rank)


def holders_of(model: Model, stages: Stages, groups: ProcessGroups) -> Holders:
    """Which ranks hold what `model`, this rank's share, holds."""
    experts = model.expert_parameter_names()

    def holders(name: str) -> tuple[int, ...]:
        by_stage = groups.expert if name in experts else groups.dense
        return tuple(sorted(by_stage[stages.holders(name)].ranks))

    return holders


def alone(name: str) -> tuple[int, ...]:
    """The holders where there is one process."""
    return (0,)


def rng_name(rank: int) -> str:
    """What the state of a rank's random generator is called."""
    return f"{RNG}/rank_{rank:05d}"


def whole_state(config: ModelConfig, kinds: Iterable[str]) -> frozenset[str]:
    """Canonical names of all that these kinds of state have of a whole model, and its routing biases."""
    names = whole_model(config)
    biases = {name for name in names if name.endswith(BIAS)}
    return frozenset(biases | {f"{kind}{name.removeprefix(MODEL)}" for kind in kinds for name in names.keys() - biases})


def whole_model(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical names of the weights and biases of a whole model, in its own order, and their shapes."""
    with torch.device("meta"):
        model = Model(config)
    return {piece.name: piece.shape for piece in model_pieces(model, alone, rank=0)}
