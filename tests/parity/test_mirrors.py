"""DualPipe holds every stage twice: the replicas start equal and stay equal to the last bit."""

from contextlib import closing
from datetime import timedelta

import torch
from torch import Tensor

from shoestring.comm.async_comm import build_async_communicator
from shoestring.comm.groups import ProcessGroups
from shoestring.tests.parity.layouts import Layout, Load, Padding
from shoestring.tests.parity.runner import build, take_step
from shoestring.tests.processes import World, run_processes

STEPS = 20
LAYOUT = Layout(1, 1, 4, 1, Padding.RAGGED, Load.EVEN, dtype=torch.float32, layers=3, pp=2, schedule="dualpipe")


def twenty_steps(world: World) -> dict[str, Tensor]:
    """Return every parameter and routing bias of this rank after twenty steps."""
    stages = LAYOUT.stages
    groups = ProcessGroups.create(LAYOUT.topology, world.rank, timedelta(seconds=60), stages.replica_pp_groups())
    with closing(build_async_communicator(groups.ep, torch.device("cpu"))) as worker:
        stepper, gradients = build(LAYOUT, stages, groups, worker)
        for step in range(STEPS):
            take_step(stepper, gradients, LAYOUT, step % 3, world.rank)
        stepper.optimizer.wait_for_weights()
    biases = {f"bias {name}": router.bias_E for name, router in stepper.model.routers()}
    return biases | {name: parameter.detach() for name, parameter in stepper.model.named_parameters()}


def test_mirrored_stages_stay_equal_to_the_last_bit() -> None:
    first, second = run_processes(2, twenty_steps, timeout=120)
    assert first.keys() == second.keys()  # both hold the whole model
    assert any(name.startswith("layers.2.") for name in first)
    different = [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]
    assert not different
