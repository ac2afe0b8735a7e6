"""The training state of one rank as pieces under canonical names."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ...comm.groups import ProcessGroups
from ...parallelism.zero.optimizer import ShardedOptimizer
from ..model.config import ModelConfig
from ..model.model import Model
from ..model.stage_layout import StageLayout
from ..optimizer.ema import WeightEMA
from .pieces import (
    EMA_STATE,
    EXP_AVG,
    EXP_AVG_SQ,
    MODEL_STATE,
    RNG_STATE,
    StateSlice,
    TensorPiece,
    pieces_of_slice,
    whole_tensor_pieces,
)

ROUTER_BIAS_SUFFIX = ".router.bias_E"

HolderRanks = Callable[[str], tuple[int, ...]]
"""Name of a buffer to the ranks that hold it, ascending."""


def training_state_pieces(
    model: Model, optimizer: ShardedOptimizer, average: WeightEMA | None, holders: HolderRanks, rank: int
) -> Iterator[TensorPiece]:
    """Masters, moments and average that `rank` owns, and what no optimizer knows of: the routing biases.

    The weights are not in it: `optimizer.publish` makes them from the masters.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    experts = model.expert_parameter_names()
    for part in _parts(optimizer, average):
        first_expert = model.first_local_expert if part.parameter in experts else None
        yield from pieces_of_slice(part, shapes[part.parameter], first_expert, rank)
    yield from _bias_pieces(model, holders)


def model_pieces(model: Model) -> Iterator[TensorPiece]:
    """The weights and routing biases alone, of a whole model on one process."""
    experts = model.expert_parameter_names()
    for name, parameter in model.named_parameters():
        first_expert = model.first_local_expert if name in experts else None
        whole = StateSlice(MODEL_STATE, name, 0, parameter.detach().view(-1))
        yield from pieces_of_slice(whole, tuple(parameter.shape), first_expert, rank=0)
    yield from _bias_pieces(model, lambda _: (0,))


def make_holder_ranks(stages: StageLayout, groups: ProcessGroups) -> HolderRanks:
    """Which ranks hold what a rank of `groups` holds."""
    return lambda name: tuple(sorted(groups.dense_dp[stages.pp_ranks_holding(name)].ranks))


def rng_state_name(rank: int) -> str:
    """What the state of a rank's random generator is called."""
    return f"{RNG_STATE}/rank_{rank:05d}"


def training_state_names(config: ModelConfig, *, with_ema: bool) -> frozenset[str]:
    """Canonical names of all that a checkpoint of a whole run has, but for random generators."""
    names = model_tensor_shapes(config)
    parameters = [name.removeprefix(MODEL_STATE) for name in names if not name.endswith(ROUTER_BIAS_SUFFIX)]
    kinds = [EXP_AVG, EXP_AVG_SQ, *([EMA_STATE] if with_ema else [])]
    return frozenset(names) | {f"{kind}{name}" for kind in kinds for name in parameters}


def model_tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical names of the weights and biases of a whole model, in its own order, and their shapes."""
    with torch.device("meta"):
        model = Model(config)
    return {piece.name: piece.shape for piece in model_pieces(model)}


def _parts(optimizer: ShardedOptimizer, average: WeightEMA | None) -> Iterator[StateSlice]:
    for owned in optimizer.local_shards():
        state = {MODEL_STATE: owned.master, EXP_AVG: owned.exp_avg, EXP_AVG_SQ: owned.exp_avg_sq}
        yield from (StateSlice(kind, owned.name, owned.offset, flat) for kind, flat in state.items())
    if average is not None:
        yield from (StateSlice(EMA_STATE, name, offset, flat) for name, offset, flat in average.local_shards())


def _bias_pieces(model: Model, holders: HolderRanks) -> Iterator[TensorPiece]:
    for name, buffer in model.named_buffers():
        yield from whole_tensor_pieces(f"{MODEL_STATE}/{name}", buffer, holders(name))
