"""The training state of one rank as pieces under canonical names."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ...comm.groups import ProcessGroups
from ...parallelism.zero.optimizer import ShardedOptimizer
from ..model.config import ModelConfig
from ..model.model import Model
from ..model.stage_layout import Stages
from ..optimizer.average import WeightAverage
from .pieces import AVERAGE, EXP_AVG, EXP_AVG_SQ, MODEL, RNG, Piece, StateSlice, part_pieces, whole_pieces

BIAS = ".router.bias_E"

Holders = Callable[[str], tuple[int, ...]]
"""Name of a buffer to the ranks that hold it, ascending."""


def state_pieces(
    model: Model, optimizer: ShardedOptimizer, average: WeightAverage | None, holders: Holders, rank: int
) -> Iterator[Piece]:
    """Masters, moments and average that `rank` owns, and what no optimizer knows of: the routing biases.

    The weights are not in it: `optimizer.publish` makes them from the masters.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    experts = model.expert_parameter_names()
    for part in _parts(optimizer, average):
        first_expert = model.first_expert if part.parameter in experts else None
        yield from part_pieces(part, shapes[part.parameter], first_expert, rank)
    yield from _bias_pieces(model, holders)


def model_pieces(model: Model) -> Iterator[Piece]:
    """The weights and routing biases alone, of a whole model on one process."""
    experts = model.expert_parameter_names()
    for name, parameter in model.named_parameters():
        first_expert = model.first_expert if name in experts else None
        whole = StateSlice(MODEL, name, 0, parameter.detach().view(-1))
        yield from part_pieces(whole, tuple(parameter.shape), first_expert, rank=0)
    yield from _bias_pieces(model, lambda _: (0,))


def holders_of(stages: Stages, groups: ProcessGroups) -> Holders:
    """Which ranks hold what a rank of `groups` holds."""
    return lambda name: tuple(sorted(groups.dense[stages.holders(name)].ranks))


def rng_name(rank: int) -> str:
    """What the state of a rank's random generator is called."""
    return f"{RNG}/rank_{rank:05d}"


def whole_state(config: ModelConfig, *, averages: bool) -> frozenset[str]:
    """Canonical names of all that a checkpoint of a whole run has, but for random generators."""
    names = whole_model(config)
    parameters = [name.removeprefix(MODEL) for name in names if not name.endswith(BIAS)]
    kinds = [EXP_AVG, EXP_AVG_SQ, *([AVERAGE] if averages else [])]
    return frozenset(names) | {f"{kind}{name}" for kind in kinds for name in parameters}


def whole_model(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical names of the weights and biases of a whole model, in its own order, and their shapes."""
    with torch.device("meta"):
        model = Model(config)
    return {piece.name: piece.shape for piece in model_pieces(model)}


def _parts(optimizer: ShardedOptimizer, average: WeightAverage | None) -> Iterator[StateSlice]:
    for owned in optimizer.owned():
        state = {MODEL: owned.master, EXP_AVG: owned.exp_avg, EXP_AVG_SQ: owned.exp_avg_sq}
        yield from (StateSlice(kind, owned.name, owned.offset, flat) for kind, flat in state.items())
    if average is not None:
        yield from (StateSlice(AVERAGE, name, offset, flat) for name, offset, flat in average.owned())


def _bias_pieces(model: Model, holders: Holders) -> Iterator[Piece]:
    for name, buffer in model.named_buffers():
        yield from whole_pieces(f"{MODEL}/{name}", buffer, holders(name))
