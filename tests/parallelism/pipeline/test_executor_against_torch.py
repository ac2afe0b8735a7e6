"""torch's own pipelining as an independent reference: the same stages, the same gradients."""

import pytest

from shoestring.benchmarks.pipeline_peers import PEERS, Sizes, ours, theirs
from shoestring.tests.processes import World, run_processes

SIZES = Sizes(width=8, rows=3, micro_batches=8, layers_per_stage=2)


def largest_difference(world: World, name: str) -> float:
    mine, peer = (
        ours(PEERS[name][0], SIZES, world.rank, world.size),
        theirs(name, SIZES, world.rank, world.size),
    )
    mine.step()
    peer.step()
    gradients, expected = mine.gradients(), peer.gradients()
    mine.close()
    assert gradients.keys() == expected.keys()
    assert all(grad.any() for grad in expected.values())
    return max(float((grad - expected[key]).norm() / expected[key].norm()) for key, grad in gradients.items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PEERS)
def test_gradients_equal_those_of_torch(name: str) -> None:
    for difference in run_processes(2, largest_difference, name):
        assert difference <= 1e-6
