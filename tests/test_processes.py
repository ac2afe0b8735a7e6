"""The process harness: ordered results, tracebacks, stacks instead of hangs, cheap starts."""

import os
import threading
import time

import pytest
import torch
import torch.distributed as dist

from shoestring.tests.processes import RanksFailed, World, run_processes


def scaled_total(world: World, scale: float, x: torch.Tensor) -> tuple[int, torch.Tensor]:
    total = x * scale * world.rank
    dist.all_reduce(total)
    return world.rank, total


def fail_on(world: World, rank: int) -> None:
    if world.rank == rank:
        raise ValueError(f"bad luck on {world.rank}")
    wait_without_end(world)


def die_on(world: World, rank: int) -> None:
    if world.rank == rank:
        os._exit(7)
    wait_without_end(world)


def wait_without_end(world: World) -> None:
    threading.Event().wait()


def hang_in_a_collective(world: World) -> None:
    if world.rank == 0:
        wait_without_end(world)
    dist.barrier()


def leave_out_a_collective(world: World) -> None:
    if world.rank != 2:
        dist.barrier()


def threads_and_draw(world: World) -> tuple[int, float]:
    return torch.get_num_threads(), torch.rand(()).item()


def nothing(world: World) -> None:
    pass


def test_results_come_in_rank_order() -> None:
    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    results = run_processes(4, scaled_total, 2.0, x)
    assert [rank for rank, _ in results] == [0, 1, 2, 3]
    for _, total in results:
        assert torch.equal(total, 12.0 * x)


def test_one_rank_is_a_world_too() -> None:
    assert run_processes(1, scaled_total, 2.0, torch.ones(1)) == [(0, torch.zeros(1))]


def test_every_rank_has_one_thread_and_the_same_seed() -> None:
    first, second = run_processes(2, threads_and_draw)
    assert first == second
    assert first[0] == 1


def test_an_exception_is_shown_with_its_rank_and_ends_the_others() -> None:
    began = time.monotonic()
    with pytest.raises(RanksFailed, match=r"(?s)^rank 1 of 3 failed:.*in fail_on.*ValueError: bad luck on 1"):
        run_processes(3, fail_on, 1)
    assert time.monotonic() - began < 30


def test_a_rank_that_dies_without_a_word_is_named() -> None:
    with pytest.raises(RanksFailed, match="rank 1 of 2 failed:\ndied with exit code 7"):
        run_processes(2, die_on, 1)


def test_a_hang_ends_with_the_stack_of_every_rank() -> None:
    with pytest.raises(RanksFailed, match="no end after 2 s") as failure:
        run_processes(2, hang_in_a_collective, timeout=2)
    before, rank_0, rank_1 = str(failure.value).replace("rank 1 was here", "rank 0 was here").split("rank 0 was here")
    assert "returned: []" in before
    assert "in wait_without_end" in rank_0
    assert "in barrier" in rank_1
    assert "in hang_in_a_collective" in rank_1


def test_a_rank_that_leaves_out_a_collective_is_named() -> None:
    with pytest.raises(RanksFailed, match=r"(?s)had returned: \[2\].*rank 0 was here.*rank 1 was here"):
        run_processes(3, leave_out_a_collective, timeout=1)


def test_a_function_that_another_process_cannot_find_is_refused() -> None:
    def inner(world: World) -> None:
        pass

    with pytest.raises(ValueError, match="top level"):
        run_processes(2, inner)


def test_a_start_is_cheap() -> None:
    run_processes(1, nothing)  # the forkserver starts here
    began = time.monotonic()
    run_processes(4, nothing)
    # Typically 0.3 s. An import of torch in each rank would take far more than this on the same machine.
    assert time.monotonic() - began < 5
