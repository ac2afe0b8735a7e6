"""The stand-ins for NCCL follow NCCL where it differs from gloo."""

import pytest
import torch
from torch import Tensor

from shoestring.comm.async_comm import StreamCommunicator
from shoestring.comm.p2p import NcclP2PChannel, P2PReceive, P2PSend
from shoestring.tests.comm.nccl_rules import (
    FIRST_CONTACT,
    RING_BYTES,
    TRUNCATED,
    QueuedStreams,
    computing_behind,
    open_group,
)
from shoestring.tests.processes import RanksFailed, World, run_processes

SMALL, LARGE = 1, RING_BYTES


def batch_of(world: World, sends: bool, receives: bool) -> float:
    """Post one batch with the other of two ranks as a first contact; return the received value, or 0."""
    streams = QueuedStreams()
    group, peer = open_group(world, streams, patience=5), 1 - world.rank
    arrived = torch.zeros(1)
    group.send_and_receive(
        [(torch.ones(1), peer)] if sends else [], [(arrived, peer)] if receives else [], "first message"
    )
    streams.current_stream().synchronize()
    return arrived.item()


def meet(world: World, batches: list[tuple[bool, bool]]) -> float:
    return batch_of(world, *batches[world.rank])


@pytest.mark.parametrize(
    ("batches", "arrived"),
    [([(True, False), (False, True)], [0, 1]), ([(True, True), (True, True)], [1, 1])],
    ids=["one way", "both ways"],
)
def test_ends_that_agree_connect(batches: list[tuple[bool, bool]], arrived: list[float]) -> None:
    assert run_processes(2, meet, batches) == arrived


def test_of_two_ranks_a_receive_alone_does_not_connect_with_a_send_and_a_receive() -> None:
    with pytest.raises(RanksFailed, match=f"{TRUNCATED}: (1 channels here, 2 on rank 1|2 channels here, 1 on rank 0)"):
        run_processes(2, meet, [(False, True), (True, True)])


def collect(world: World, sizes: list[list[int]]) -> None:
    """All-reduce tensors of this rank's byte sizes."""
    streams = QueuedStreams()
    group = open_group(world, streams, patience=2)
    for size in sizes[world.rank]:
        group.all_reduce_sum(torch.zeros(size, dtype=torch.uint8), "sum")
    if world.rank:
        return
    streams.current_stream().synchronize()


def test_a_small_collective_does_not_connect_what_a_large_one_uses() -> None:
    with pytest.raises(RanksFailed, match=FIRST_CONTACT):
        run_processes(2, collect, [[SMALL, LARGE], [SMALL]])


def test_a_collective_that_is_connected_blocks_no_rank() -> None:
    run_processes(2, collect, [[LARGE], [LARGE, LARGE]])


def answer_before_question(world: World) -> float:
    """Rank 0 waits for an answer before it posts the question: the wait blocks one stream, not the host."""
    streams = QueuedStreams()
    down, up = (NcclP2PChannel(open_group(world, streams), StreamCommunicator(streams)) for _ in range(2))
    peer, side = 1 - world.rank, streams.create_stream("side")

    def one() -> Tensor:
        return torch.empty(1)

    with computing_behind(streams):
        for channel in (down, up):
            channel.post([P2PSend("first", torch.zeros(1), peer)], [P2PReceive("first", one, peer)])
            channel.wait_for_sends()
        if world.rank == 0:
            (answer,) = down.post([], [P2PReceive("answer", one, peer)])
            with streams.use_stream(side):
                arrived = answer.wait()
            up.post([P2PSend("question", torch.full((1,), 3.0), peer)], [])
            with streams.use_stream(side):
                return arrived.item()
        (question,) = up.post([], [P2PReceive("question", one, peer)])
        arrived = question.wait()
        down.post([P2PSend("answer", arrived + 1, peer)], [])
        return arrived.item()


def test_waiting_holds_a_stream_and_computing_behind_it_the_host() -> None:
    assert run_processes(2, answer_before_question) == [4.0, 3.0]


def launch_two(world: World) -> list[bool]:
    """Launch on one communicator a call whose stream is blocked by another, then a call on a free stream."""
    streams = QueuedStreams()
    held, group = open_group(world, streams), open_group(world, streams)
    for each in (held, group):
        each.all_reduce_sum(torch.zeros(1), "first")
    streams.current_stream().synchronize()
    sums = [torch.ones(1), torch.ones(1)]
    busy, free = streams.create_stream("busy"), streams.create_stream("free")
    with streams.use_stream(busy):
        if world.rank == 0:
            held.all_reduce_sum(torch.zeros(1), "what holds the stream")
        group.all_reduce_sum(sums[0], "earlier")
    with streams.use_stream(free):
        group.all_reduce_sum(sums[1], "later")
    early = free.record_event().parts[0].done()
    if world.rank == 1:
        held.all_reduce_sum(torch.zeros(1), "what holds the stream")
    free.synchronize()
    return [early, *(total.item() == 2 for total in sums)]


def test_calls_on_one_communicator_run_in_launch_order() -> None:
    first, second = run_processes(2, launch_two)
    assert not second[0]  # rank 1 has not yet made the call that holds the earlier one on rank 0
    assert [*first[1:], *second[1:]] == [True] * 4
