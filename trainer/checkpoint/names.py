"""The training state of one rank as a flat dictionary of tensors, each under a name that is unique over all ranks.

A name never means different tensors on two ranks: the checkpoint library takes equal names for replicas and keeps one
of them.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ...parallelism.zero import ShardedOptimizer
from ..model.model import Model
from ..optimizer.average import WeightAverage


def named_state(
    model: Model,
    optimizer: ShardedOptimizer,
    average: WeightAverage | None,
    rank: int,
    rng: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Masters, moments, average and routing biases as views, so that loading into them changes the state; and `rng`.

    The weights are not in it: `optimizer.publish` makes them from the masters. Each rank writes what it owns.
    """
    state: dict[str, Tensor] = dict(rng)
    for owned in optimizer.owned():
        place = f"{owned.name}/rank_{rank:05d}"
        state |= {
            f"master/{place}": owned.master,
            f"exp_avg/{place}": owned.exp_avg,
            f"exp_avg_sq/{place}": owned.exp_avg_sq,
        }
    if average is not None:
        state |= {f"average/{name}/rank_{rank:05d}": stretch for name, _, stretch in average.owned()}
    for layer, router in model.routers():
        state[f"routing_bias/{layer}"] = router.bias_E
    return state
