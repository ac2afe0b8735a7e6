"""Selection of the ranks to rehearse."""

from collections.abc import Iterator

from ...comm.errors import Problem, raise_if_any
from ...comm.topology import Topology
from ...parallelism.pipeline.schedules.registry import schedule_problems
from ...trainer.config import RunConfig


def representative_ranks(topology: Topology) -> tuple[int, ...]:
    """Return ranks that together run all code of the grid and have every kind of neighbor.

    They are one of each pipeline rank, all at the same position in their data-parallel groups; and for the middle
    pipeline rank, which holds the most expert layers, a second member of its EP group and of its edp group.
    """
    chosen = {pp_rank * topology.dp for pp_rank in range(topology.pp)}
    middle = topology.pp // 2 * topology.dp
    chosen.update(topology.ep_ranks(middle)[1:2])
    chosen.update(topology.expert_dp_ranks(middle)[1:2])
    return tuple(sorted(chosen))


def select_ranks(topology: Topology, listed: str | None) -> tuple[int, ...]:
    """Parse `--ranks`, such as `0,7,901`; default to representative ranks. Ascending. Raises `ConfigError`."""
    if listed is None:
        return representative_ranks(topology)
    ranks: list[int] = []
    raise_if_any(_parse(listed, topology.world_size, ranks))
    return tuple(sorted(ranks))


def _parse(listed: str, world_size: int, ranks: list[int]) -> Iterator[Problem]:
    """Parse `listed` into `ranks`, and yield problems."""
    for text in listed.split(","):
        try:
            rank = int(text)
        except ValueError:
            yield Problem("--ranks", text, "write rank numbers separated by commas, as in 0,7,901")
            continue
        if not 0 <= rank < world_size:
            yield Problem("--ranks", rank, f"the run has {world_size} ranks; write numbers from 0 to {world_size - 1}")
        elif rank in ranks:
            yield Problem("--ranks", rank, "is repeated; write each rank once")
        else:
            ranks.append(rank)


def micro_batch_problems(config: RunConfig, micro_batches: int | None) -> Iterator[Problem]:
    """Yield a problem if a step cannot have `micro_batches`; None stands for the number of the first step."""
    if micro_batches is None:
        return
    schedule = config.schedule
    for problem in schedule_problems(schedule.name, config.topology.pp, micro_batches, schedule.chunks):
        yield Problem("--micro-batches", micro_batches, problem.hint)
