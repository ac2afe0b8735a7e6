"""Exchanges progress before they are waited on, in one order on all ranks; errors name rank, call and peers."""

import threading
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch

from shoestring.comm.async_comm import (
    AsyncWork,
    CollectiveOrderCheck,
    InlineCommunicator,
    StreamCommunicator,
    ThreadCommunicator,
    build_async_communicator,
    iter_tensors,
)
from shoestring.comm.errors import CollectiveError
from shoestring.comm.exchange.config import ExchangeConfig
from shoestring.comm.groups import ProcessGroups
from shoestring.comm.host_transfer import AsyncHostCopier
from shoestring.comm.topology import Topology
from shoestring.comm.trace import ExchangeCall, ExchangeLabel
from shoestring.tests.comm.exchange.routing import CASES, LABEL, batch_of, open_on
from shoestring.tests.comm.recorded_streams import HOST_WAITS, REST, RecordedStreams
from shoestring.tests.processes import World, run_processes

QUICK = 1e-3  # seconds
CALL = str(ExchangeCall("dispatch", LABEL))


def test_an_error_in_the_worker_is_raised_by_wait() -> None:
    worker = ThreadCommunicator()
    pending = worker.submit(CALL, lambda: torch.ones(2) @ torch.ones(3), ())
    with pytest.raises(RuntimeError):
        pending.wait()
    worker.close()


def test_after_a_failure_nothing_more_is_tried() -> None:
    worker, tried = ThreadCommunicator(), []
    first = worker.submit(CALL, lambda: 1 / 0, ())
    second = worker.submit(CALL, lambda: tried.append(1), ())
    for pending in (first, second):
        with pytest.raises(ZeroDivisionError):
            pending.wait()
    worker.close()
    assert not tried


def test_close_lets_the_running_one_end_and_starts_no_other() -> None:
    worker, running, go_on = ThreadCommunicator(), threading.Event(), threading.Event()
    done: list[int] = []

    def first() -> None:
        running.set()
        go_on.wait()
        done.append(1)

    worker.submit(CALL, first, ())
    worker.submit(CALL, lambda: done.append(2), ())
    running.wait()
    closing = threading.Thread(target=worker.close)
    closing.start()
    go_on.set()
    closing.join()
    assert done == [1]


def test_nothing_in_a_worker_is_recorded_by_autograd() -> None:
    x = torch.ones(2, requires_grad=True)
    for worker in (ThreadCommunicator(), InlineCommunicator(), on_streams()[0]):
        assert not worker.submit(CALL, lambda: 2 * x, (x,)).wait().requires_grad
        assert not worker.submit_two_part(CALL, lambda: lambda: 2 * x, (x,)).wait().requires_grad
        worker.close()


def on_streams() -> tuple[StreamCommunicator, RecordedStreams]:
    streams = RecordedStreams()
    return StreamCommunicator(streams, recorder=streams), streams


def test_the_second_part_runs_when_it_is_asked_for() -> None:
    for worker in (InlineCommunicator(), on_streams()[0]):
        done: list[str] = []

        def first(done: list[str] = done) -> Callable[[], None]:
            done.append("first")
            return lambda: done.append("second")

        pending = worker.submit_two_part(CALL, first, ())
        assert done == ["first"]
        pending.launch_second_part()
        pending.wait()
        assert done == ["first", "second"]
        worker.submit_two_part(CALL, first, ()).wait()
        assert done == ["first", "second"] * 2


def test_a_thread_runs_the_second_part_unasked() -> None:
    worker, done = ThreadCommunicator(), threading.Event()
    pending = worker.submit_two_part(CALL, lambda: done.set, ())
    assert done.wait(timeout=30)
    pending.wait()
    worker.close()


def test_nothing_comes_between_two_parts() -> None:
    """A thread runs both parts together; with a call between them, its collectives would differ from a stream's."""
    for worker in (ThreadCommunicator(), InlineCommunicator(), on_streams()[0]):
        pending = worker.submit_two_part(CALL, lambda: lambda: 1, ())
        for submit in (worker.submit, worker.submit_two_part):
            with pytest.raises(RuntimeError, match="before the second part of dispatch of layer_01, micro-batch 2"):
                submit("another", lambda: lambda: 2, ())
        pending.launch_second_part()
        worker.submit("another", lambda: 2, ())
        assert pending.wait() == 1
        worker.close()


def test_the_second_part_waits_for_nothing_that_was_computed_since_the_first() -> None:
    worker, streams = on_streams()
    with streams.queue("before"):
        pass
    pending = worker.submit_two_part(CALL, lambda: lambda: None, ())
    with streams.queue("between"):
        pass
    pending.wait()
    assert streams.needs[REST + CALL] == {"before", CALL}


def test_buffers_of_copies_to_the_host_are_used_again() -> None:
    streams = RecordedStreams()
    copies = AsyncHostCopier(streams)
    x, y = torch.tensor([1, 2]), torch.tensor([3, 4])
    first, second = copies.start_copy(x), copies.start_copy(y)
    x.zero_()  # the copy was queued before
    numbers = first.wait()
    buffers = [buffer.data_ptr() for buffers in copies._free.values() for buffer in buffers]
    third = copies.start_copy(torch.tensor([5, 6]))
    assert third._numbers.data_ptr() in buffers
    assert [each.tolist() for each in (numbers, first.wait(), second.wait(), third.wait())] == [
        [1, 2],
        [1, 2],
        [3, 4],
        [5, 6],
    ]
    assert streams.diary == [HOST_WAITS] * 3
    assert AsyncHostCopier(None).start_copy(y).wait() is y


def test_every_tensor_of_a_result_is_found() -> None:
    a, b = torch.ones(1), torch.ones(2)
    exchange, _, _ = open_on(Topology(), 0, ExchangeConfig())
    received = exchange.dispatch(torch.ones(3, 4), torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int64), LABEL).wait()
    found = list(iter_tensors((received, (a, b))))
    assert any(tensor is received.rows_RD for tensor in found)
    assert any(tensor is received.gate_weights_R for tensor in found)
    assert found[-2:] == [a, b]


def slowest(seconds: float) -> float:
    """Return the largest value of all ranks, so that all of them retry or none."""
    of_all = torch.tensor(seconds)
    torch.distributed.all_reduce(of_all, torch.distributed.ReduceOp.MAX)
    return of_all.item()


def seconds_of_waiting(world: World, name: str) -> dict[str, float]:
    """Return the seconds that `wait` takes after the caller has computed for twice the time of the exchange."""
    topology = Topology(ep=world.size, gpus_per_node=1)
    exchange, _, worker = open_on(topology, world.rank, ExchangeConfig(name=name))
    batch = batch_of(CASES[3], topology, world.rank, torch.float32)
    received = exchange.dispatch(batch.tokens_TD, batch.weights_TK, batch.experts_TK, LABEL).wait()
    operations: dict[str, Callable[[], AsyncWork[object]]] = {
        "dispatch": lambda: exchange.dispatch(batch.tokens_TD, batch.weights_TK, batch.experts_TK, LABEL),
        "combine": lambda: exchange.combine(received.rows_RD, received),
        "combine_backward": lambda: exchange.combine_backward(batch.grad_TD, received),
        "dispatch_backward": lambda: exchange.dispatch_backward(received.rows_RD, received.gate_weights_R, received),
    }
    waited = {}
    square = torch.randn(64, 64)
    for operation, start in operations.items():
        began = time.perf_counter()
        start().wait()
        wire = time.perf_counter() - began
        shortest = float("inf")
        for _ in range(50):  # other processes disturb the timing
            if slowest(shortest) < QUICK:
                break
            pending, began = start(), time.perf_counter()
            while time.perf_counter() - began < 2 * wire + 0.02:
                torch.mm(square, square)
            began = time.perf_counter()
            pending.wait()
            shortest = min(shortest, time.perf_counter() - began)
        waited[operation] = shortest
    worker.close()
    return waited


@pytest.mark.parametrize("name", ["flat", "two_hop"])
def test_wait_launches_nothing(name: str) -> None:
    for waited in run_processes(2, seconds_of_waiting, name):
        assert all(seconds < QUICK for seconds in waited.values()), waited


def other_order(world: World) -> str:
    groups = ProcessGroups.create(Topology(ep=2), world.rank, timedelta(seconds=30))
    order = CollectiveOrderCheck(groups.ep)
    worker = build_async_communicator(groups.ep, torch.device("cpu"), order)
    for operation in ("dispatch", "combine") if world.rank else ("dispatch", "dispatch"):
        pending = worker.submit(str(ExchangeCall(operation, LABEL)), lambda: None, ())
    with pytest.raises(CollectiveError) as failure:
        pending.wait()
    worker.close()
    assert order.issued[0] == "dispatch of layer_01, micro-batch 2"
    return str(failure.value)


def test_ranks_that_disagree_on_the_order_raise() -> None:
    for rank, message in enumerate(run_processes(2, other_order)):
        assert message == (
            f"rank {rank}: the ranks disagree on the order of exchanges: rank 0 runs number 2, dispatch of layer_01, "
            "micro-batch 2; rank 1 runs number 2, combine of layer_01, micro-batch 2"
        )


def absent_peer(world: World, name: str) -> str:
    """Rank 1 never takes part: rank 0 must not hang."""
    topology = Topology(ep=2, gpus_per_node=1)
    groups = ProcessGroups.create(topology, world.rank, timedelta(seconds=1))
    if world.rank == 1:
        return ""
    exchange, _, worker = open_on(topology, world.rank, ExchangeConfig(name=name), groups)
    batch = batch_of(CASES[0], topology, world.rank, torch.float32)
    label = ExchangeLabel("layer_07", 5)
    pending = exchange.dispatch(batch.tokens_TD, batch.weights_TK, batch.experts_TK, label)
    with pytest.raises(CollectiveError) as failure:
        pending.wait()
    worker.close()
    return str(failure.value)


@pytest.mark.parametrize("name", ["flat", "two_hop"])
def test_a_collective_past_its_limit_names_everything(name: str) -> None:
    message, _ = run_processes(2, absent_peer, name)
    assert message.startswith("rank 0: sizes of dispatch of layer_07, micro-batch 5 with ranks 1 failed after 1.")
    assert "(limit 1 s): " in message
    assert "\n" not in message
