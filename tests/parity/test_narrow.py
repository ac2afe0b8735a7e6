"""BF16 weights with FP32 masters give the bits of FP32 weights that are cast at each use."""

from contextlib import closing, nullcontext
from datetime import timedelta
from unittest.mock import patch

import torch

from shoestring.comm.async_comm import build_async_communicator
from shoestring.comm.groups import ProcessGroups
from shoestring.tests.parity.layouts import Layout, Padding
from shoestring.tests.parity.outcome import StepOutcome
from shoestring.tests.parity.runner import build, take_step
from shoestring.tests.processes import World, run_processes
from shoestring.trainer.model.model import Model

LAYOUT = Layout(2, 1, 2, 1, Padding.RAGGED, dtype=torch.float32)


def three_steps(world: World, kept_wide: bool) -> tuple[list[StepOutcome], dict[str, torch.dtype]]:
    """Return the outcomes of three steps, and the dtype of each weight."""
    stages = LAYOUT.stages
    groups = ProcessGroups.create(LAYOUT.topology, world.rank, timedelta(seconds=60), stages.replica_pp_groups())
    everything = patch.object(Model, "fp32_parameter_names", lambda self: {name for name, _ in self.named_parameters()})
    with (
        closing(build_async_communicator(groups.ep, torch.device("cpu"))) as worker,
        everything if kept_wide else nullcontext(),
    ):
        stepper, reducer = build(LAYOUT, stages, groups, worker, compute=torch.bfloat16)
        steps = [take_step(stepper, reducer, LAYOUT, step, world.rank) for step in range(3)]
    return steps, {name: parameter.dtype for name, parameter in stepper.model.named_parameters()}


def test_bf16_weights_change_no_bit() -> None:
    """The gradients of the second step contain the first step's update, those of the third both."""
    narrow, wide = (run_processes(2, three_steps, kept_wide) for kept_wide in (False, True))
    for (ours, dtypes), (theirs, all_wide) in zip(narrow, wide, strict=True):
        assert set(all_wide.values()) == {torch.float32}
        kept = {name for name, dtype in dtypes.items() if dtype == torch.float32}
        assert kept == {name for name in dtypes if "norm" in name or "router" in name}
        assert all(dtypes[name] == torch.bfloat16 for name in dtypes.keys() - kept)
        for step, reference in zip(ours, theirs, strict=True):
            assert step.total == reference.total
            assert all(gradient.dtype == torch.float32 for gradient in step.gradients.values())
            assert not [
                name for name, grad in step.gradients.items() if not torch.equal(grad, reference.gradients[name])
            ]
