"""Gradients are reduced after the last instruction that touches them, in one order, with one decision."""

from contextlib import closing, nullcontext
from datetime import timedelta
from unittest.mock import patch

import pytest
import torch

from shoestring.comm.async_comm import build_async_communicator
from shoestring.comm.errors import CollectiveError
from shoestring.comm.groups import ProcessGroups
from shoestring.comm.trace import TimelineTrack
from shoestring.parallelism.zero.reduce import GradientReducer
from shoestring.tests.parity.breaks import BREAKS
from shoestring.tests.parity.layouts import Layout, Load, Padding
from shoestring.tests.parity.runner import build, take_step
from shoestring.tests.processes import World, run_processes
from shoestring.trainer.run.step import NonFiniteStep
from shoestring.trainer.telemetry.trace import TraceRecorder

PIPELINES = [
    Layout(1, 2, 4, 1, Padding.RAGGED, pp=2, layers=4, schedule="dualpipev"),
    Layout(1, 2, 4, 1, pp=2, schedule="dualpipe"),
    Layout(2, 1, 4, 1, pp=2, layers=4, schedule="interleaved"),
]
ALONE = "squares of other ranks left out"


def reductions(world: World, layout: Layout) -> tuple[list[str], list[str]]:
    """Return the buckets in the order of their reductions: those before the last instruction began, and all."""
    stages = layout.stages
    groups = ProcessGroups.create(layout.topology, world.rank, timedelta(seconds=60), stages.replica_pp_groups())
    trace = TraceRecorder(nvtx=False)
    with closing(build_async_communicator(groups.ep, torch.device("cpu"), recorder=trace)) as worker:
        stepper, reducer = build(layout, stages, groups, worker, trace)
        trace.is_recording = True
        take_step(stepper, reducer, layout, 0, world.rank)
    ops = {"F", "B", "I", "W", "FB"}
    last = max(span.begin for span in trace.spans if span.track is TimelineTrack.INSTRUCTION and span.name in ops)
    starts = sorted(
        (span.begin, span.name)
        for span in trace.spans
        if span.track is TimelineTrack.LAUNCH and span.name.startswith("sum of gradients")
    )
    return [name for begin, name in starts if begin < last], [name for _, name in starts]


@pytest.mark.parametrize("layout", PIPELINES, ids=lambda layout: layout.name.replace(" ", "-"))
def test_a_bucket_is_reduced_while_the_program_still_runs(layout: Layout) -> None:
    ranks = run_processes(layout.topology.world_size, reductions, layout)
    dp = layout.topology.dp
    for rank, (early, every) in enumerate(ranks):
        assert early or rank >= dp  # the pipeline's first rank is done last with one of its stages alone
        assert len(every) == len(set(every)) > len(early)
        for _, others in ranks:  # of those that two ranks share, both start the same one first
            shared = set(every) & set(others)
            assert [name for name in every if name in shared] == [name for name in others if name in shared]


def with_one_nan(world: World, break_name: str | None) -> tuple[str, bool, float]:
    """Return each rank's decision in a step where one rank has a NaN, whether its weights moved, and the next norm."""
    layout = Layout(2, 1, 1, 1)
    stages = layout.stages
    groups = ProcessGroups.create(layout.topology, world.rank, timedelta(seconds=3), stages.replica_pp_groups())
    after = GradientReducer.after_instruction

    def damaged(self: GradientReducer, instruction: int) -> None:
        if world.rank == 1 and instruction == 0:
            self.buckets[0].grads_N[0] = torch.nan  # of the shard that rank 0 owns; the backward is still to come
        after(self, instruction)

    with closing(build_async_communicator(groups.ep, torch.device("cpu"))) as worker:
        stepper, reducer = build(layout, stages, groups, worker)
        before = [bucket.weights_N.clone() for bucket in reducer.buckets]
        broken = nullcontext() if break_name is None else BREAKS[break_name].apply()
        with broken, patch.object(GradientReducer, "after_instruction", damaged):
            try:
                take_step(stepper, reducer, layout, 0, world.rank)
                stepper.optimizer.wait_for_weights()  # for the other rank's weights
                did = "stepped"
            except NonFiniteStep:
                did = "refused"
            except CollectiveError:
                return "waited for a rank that had refused", True, 0.0
        moved = any(not torch.equal(old, new.weights_N) for old, new in zip(before, reducer.buckets, strict=True))
        norm = 0.0 if break_name is not None else take_step(stepper, reducer, layout, 0, world.rank).norm
    return did, moved, norm


def test_one_nan_on_one_rank_is_one_decision_for_all_and_leaves_nothing_behind() -> None:
    first, second = run_processes(2, with_one_nan, None)
    assert first == second
    assert first[:2] == ("refused", False)
    assert 0 < first[2] < float("inf")


def test_ranks_that_judge_alone_wait_for_each_other() -> None:
    words = [did for did, _, _ in run_processes(2, with_one_nan, ALONE)]
    assert words == ["refused", "waited for a rank that had refused"]


def idle_steps(world: World) -> list[float]:
    """Return the norms of three steps in which the last rank's experts receive no token."""
    layout = Layout(2, 2, 1, 1, load=Load.IDLE, dtype=torch.float32)
    stages = layout.stages
    groups = ProcessGroups.create(layout.topology, world.rank, timedelta(seconds=20), stages.replica_pp_groups())
    with closing(build_async_communicator(groups.ep, torch.device("cpu"))) as worker:
        stepper, reducer = build(layout, stages, groups, worker)
        norms = [take_step(stepper, reducer, layout, step, world.rank).norm for step in range(3)]
    own = [bucket for bucket in reducer.buckets if bucket.name.startswith("experts")]
    assert own
    assert any(bucket.grads_N.any() for bucket in own) == (groups.topology.ep_rank(world.rank) == 0)
    return norms


def test_experts_without_a_token_take_part_and_no_rank_hangs() -> None:
    first, *others = run_processes(4, idle_steps)
    assert all(norms == first for norms in others)
