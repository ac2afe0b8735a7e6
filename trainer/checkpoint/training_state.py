"""Training state of one rank as pieces under canonical names."""

from collections.abc import Callable, Iterable, Iterator

import torch

from ...parallelism.zero.optimizer import ShardedOptimizer
from ..model.config import ModelConfig
from ..model.model import Model
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
"""Function from the name of a buffer to the ranks that hold it, ascending."""


def training_state_pieces(
    model: Model, optimizer: ShardedOptimizer, average: WeightEMA | None, holders: HolderRanks, rank: int
) -> Iterator[TensorPiece]:
    """Yield the master weights, moments and average that `rank` owns, and the routing biases.

    Compute weights are not saved: `optimizer.all_gather_weights` casts them from the masters.
    """
    return _pieces(model, _parts(optimizer, average), holders, rank)


def model_pieces(model: Model) -> Iterator[TensorPiece]:
    """Yield the weights and routing biases of a whole model in one process."""
    weights = ((name, parameter.detach().view(-1)) for name, parameter in model.named_parameters())
    return _pieces(model, (StateSlice(MODEL_STATE, name, 0, flat) for name, flat in weights), lambda _: (0,), rank=0)


def rng_state_name(rank: int) -> str:
    """Return the tensor name of a rank's random generator state."""
    return f"{RNG_STATE}/rank_{rank:05d}"


def training_state_names(config: ModelConfig, *, with_ema: bool) -> frozenset[str]:
    """Return the canonical names of all tensors of a run's checkpoint, except random generator states."""
    names = model_tensor_shapes(config)
    parameters = [name.removeprefix(MODEL_STATE) for name in names if not name.endswith(ROUTER_BIAS_SUFFIX)]
    kinds = [EXP_AVG, EXP_AVG_SQ, *([EMA_STATE] if with_ema else [])]
    return frozenset(names) | {f"{kind}{name}" for kind in kinds for name in parameters}


def model_tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a whole model's weights and routing biases by canonical name, in model order."""
    with torch.device("meta"):
        model = Model(config)
    return {piece.name: piece.shape for piece in model_pieces(model)}


def _parts(optimizer: ShardedOptimizer, average: WeightEMA | None) -> Iterator[StateSlice]:
    for owned in optimizer.local_shards():
        state = {MODEL_STATE: owned.master, EXP_AVG: owned.exp_avg, EXP_AVG_SQ: owned.exp_avg_sq}
        yield from (StateSlice(kind, owned.name, owned.offset, flat) for kind, flat in state.items())
    if average is not None:
        yield from (StateSlice(EMA_STATE, name, offset, flat) for name, offset, flat in average.local_shards())


def _pieces(model: Model, parts: Iterable[StateSlice], holders: HolderRanks, rank: int) -> Iterator[TensorPiece]:
    """Yield the pieces of `parts`, held by `rank`, and of the routing biases."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    experts = model.expert_parameter_names()
    for part in parts:
        first_expert = model.first_local_expert if part.parameter in experts else None
        yield from pieces_of_slice(part, shapes[part.parameter], first_expert, rank)
    for name, buffer in model.named_buffers():
        yield from whole_tensor_pieces(f"{MODEL_STATE}/{name}", buffer, holders(name))
