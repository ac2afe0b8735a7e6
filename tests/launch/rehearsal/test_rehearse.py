"""`shoestring rehearse` on a tiny model: refusals, findings for planted faults, and output."""

import pytest
import torch

from shoestring.launch.compose import compose_run_config
from shoestring.launch.rehearsal.findings import RunFinding
from shoestring.launch.rehearsal.launch_counts import moe_layer_totals
from shoestring.launch.rehearsal.result import RehearsalResult
from shoestring.launch.rehearsal.verb import rehearse
from shoestring.tests.launch.rehearsal.small_grid import SMALL
from shoestring.trainer.memory.forecast import MemoryPredictor

pytestmark = pytest.mark.usefixtures("shim")
SEEDED = ("-m", "shoestring.tests.launch.rehearsal.seeded")


def rehearsed(ranks: str | None, *overrides: str, fault: tuple[str, str] | None = None) -> RehearsalResult:
    entry = None if fault is None else (*SEEDED, *fault)
    return rehearse([*SMALL, *overrides], None, ranks, None, lambda line: None, entry)


def of_kind(result: RehearsalResult, kind: str) -> list[RunFinding]:
    return [fault for fault in result.findings if fault.kind == kind]


@pytest.fixture(scope="module")
def sound() -> RehearsalResult:
    """Rehearse the representative ranks without a fault."""
    return rehearsed(None)


def test_nothing_is_found_on_sound_ranks(sound: RehearsalResult) -> None:
    assert [log.rank for log in sound.logs] == [0, 2, 3]
    assert not sound.findings
    assert sound.compared_counts > (10, 8)
    assert {"compute", "exchange"} == set(moe_layer_totals(sound.launches_by_phase))


def test_pipeline_ranks_that_were_not_connected_hang() -> None:
    result = rehearsed("0,2", fault=("no_warm_up", "0,2"))
    (found,) = result.findings
    assert (found.kind, found.ranks) == ("hang", (0, 2))
    assert "connects rank 0 to rank 2 on `pp next` of ranks 0, 2 for its first message" in found.text
    assert all("parallelism/pipeline/executor.py" in place for place in found.code_locations)


def test_a_tensor_of_the_host_is_named() -> None:
    result = rehearsed("2", fault=("host_tensor", "2"))
    (found,) = result.findings
    assert (found.kind, found.ranks) == ("device", (2,))
    assert "add takes a float32 host tensor [16]" in found.text
    assert "trainer/model/router.py" in found.code_locations[0]


def test_a_shape_that_differs_between_neighbors_is_named() -> None:
    result = rehearsed("0,2", fault=("message_shape", "2"))
    assert result.findings
    found = of_kind(result, "message")[0]
    assert set(found.ranks) == {0, 2}
    assert "[1, 32, 128]" in found.text
    assert "[2, 32, 128]" in found.text
    assert all("parallelism/pipeline/executor.py" in place for place in found.code_locations)


def test_swapped_collectives_are_named() -> None:
    result = rehearsed("2,3", "model.num_hidden_layers=6", "schedule=interleaved", fault=("swapped_collectives", "3"))
    assert result.findings
    found = next(fault for fault in of_kind(result, "collective") if "sum of gradients" in fault.text)
    assert found.ranks == (2, 3)
    assert "parallelism/zero/reduce.py" in found.code_locations[0]


def test_a_receive_without_a_send_is_named() -> None:
    result = rehearsed("0,2", fault=("no_send", "0"))
    assert result.findings
    (found,) = of_kind(result, "message")
    assert found.ranks == (0, 2)
    assert "rank 0 sends activation of micro-batch 1" in found.text
    assert "rank 2 receives activation of micro-batch 0" in found.text
    assert of_kind(result, "hang")


def test_a_layout_that_does_not_fit_is_named() -> None:
    """The GPU has room for the rank's predicted memory with everything recomputed, but not with nothing recomputed."""
    layout = ("schedule=gpipe", "training.global_batch_size=8", "training.sequence_length=128")
    least, most = (
        MemoryPredictor(compose_run_config([*SMALL, *layout, f"recompute={name}"]), torch.device("cuda")).predict_rank(
            0
        )
        for name in ("everything", "nothing")
    )
    assert most.allocator_bytes > 1.2 * least.allocator_bytes
    gigabytes = ((least.allocator_bytes + most.allocator_bytes) / 2 + least.non_allocator.total) / 1e9
    for name, faults in (("everything", []), ("nothing", [("memory", (0,))])):
        result = rehearsed("0", *layout, f"recompute={name}", f"cluster.memory_gb={gigabytes}")
        assert [(fault.kind, fault.ranks) for fault in result.findings] == faults
