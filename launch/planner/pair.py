"""The pair of chunks of which DeepSeek has published a trace, simulated: a check of lanes and prices."""

from __future__ import annotations

from ...parallelism.pipeline.overlap import take_turns
from ...trainer.memory.chunk import StageShape
from .lanes import ChunkCosts, Lanes, SimulatedChunk
from .published import PAIR_ROWS

TRACED = StageShape(dense=0, routed=4, is_first=False, is_last=False)


def simulate_pair(costs: ChunkCosts, *, as_routed: bool = True) -> Lanes:
    """Forward and backward of four routed layers in turns; `as_routed`: with the rows that reached the traced rank."""
    forward_rows, backward_rows = PAIR_ROWS if as_routed else ((), ())
    lanes, costs = Lanes(), costs.apart()  # a look aside, which is no part of the forecast
    parts = costs.shape, costs.cost, costs.wire, lanes, True
    take_turns(
        SimulatedChunk(TRACED, *parts, backward_rows).backward(weights=True),
        SimulatedChunk(TRACED, *parts, forward_rows).forward(),
    )
    return lanes


def exposed_share(lanes: Lanes) -> float:
    """Of the time, in which no kernel runs but an exchange's: waits, and gaps between kernels beside an exchange."""
    return (lanes.exposed + lanes.idle_beside) / lanes.now
