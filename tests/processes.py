"""Run a function in several processes joined by gloo, never hanging: the harness of tests with more than one rank.

    def total(world: World, value: float) -> float:
        x = torch.tensor(value * world.rank)
        dist.all_reduce(x)
        return x.item()

    assert run_processes(4, total, 2.0) == [12.0] * 4

One forkserver imports torch once; each rank is then a fork of it, so a start costs a fraction of a second.
"""

import contextlib
import faulthandler
import functools
import importlib
import inspect
import multiprocessing
import os
import pickle
import random
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple

import torch
import torch.distributed as dist

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")

ROOT = Path(__file__).resolve().parents[1]

# What tests and the package import at their heads. The forkserver passes over a name that it cannot import.
PRELOADED = (
    "numpy",
    "omegaconf",
    "pytest",
    "torch._dynamo",  # AdamW imports it, 0.6 s in each rank
    "shoestring.tests.processes",
)

# When one rank fails, others often fail of the same cause a moment later. Their tracebacks are worth this many seconds.
SECONDS_FOR_OTHERS = 0.5
# A signaled rank prints its stack immediately, from the signal handler; this is for a busy machine.
SECONDS_FOR_STACKS = 5.0


class RanksFailed(Exception):  # noqa: N818 -- says what happened
    """One or more ranks raised, died or hung. The message holds their tracebacks and stacks."""


@dataclass(frozen=True)
class World:
    """The rank's place. The default process group, gloo over a FileStore at `store`, is open."""

    rank: int
    size: int
    store: Path


@dataclass(frozen=True)
class Task:
    """The call that every rank runs. The arguments are pickled: multiprocessing would share tensors by descriptor."""

    module: str
    name: str
    arguments: bytes
    timeout: float


@dataclass(frozen=True)
class Rank:
    """The parent's end of one rank. A rank prints its Python stack to the file `stack` on a crash or on request."""

    number: int
    process: ForkServerProcess
    outcome: "Connection[Any, Any]"
    stack: Path

    def receive(self) -> tuple[bytes | None, str]:
        """Return the pickled result and "", or None and the traceback."""
        try:
            result, failure = pickle.loads(self.outcome.recv_bytes())
        except EOFError:
            self.process.join()
            return None, f"died with exit code {self.process.exitcode} and sent nothing\n{self.stack.read_text()}"
        return result, failure


def run_processes(
    ranks: int, function: Callable[[World, *Arguments], T], *args: *Arguments, timeout: float = 60
) -> list[T]:
    """Run `function(world, *args)` in `ranks` processes and return the results in rank order.

    `function` stands at the top level of a file of this repository. Arguments and results are plain data, tensors on
    the CPU, or types of the package; a class of the test file itself would be a second class in the other process.
    Every rank starts with the seed 0, one thread, and the default process group open.

    Raises:
        RanksFailed: a rank raised or died; the first to do so comes first and the others are ended. Or `timeout`
            seconds passed (wall clock, without the start of the forkserver); then it holds each rank's Python stack.
    """
    __tracebackhide__ = True
    task = Task(*_address(function), pickle.dumps(args), timeout)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as cleanup:
        members = [_start(number, ranks, task, Path(folder), cleanup) for number in range(ranks)]
        results = _collect(members, timeout)
    return [pickle.loads(results[number]) for number in range(ranks)]


def _address(function: Callable[..., object]) -> tuple[str, str]:
    """Return module and name under which another process finds `function`, whatever pytest calls its module."""
    path = Path(inspect.getfile(function)).resolve()
    name = function.__qualname__
    if "." in name or not path.is_relative_to(ROOT):
        raise ValueError(f"{name} of {path} must stand at the top level of a file under {ROOT}")
    return ".".join(("shoestring", *path.relative_to(ROOT).with_suffix("").parts)), name


@functools.cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def _start(number: int, ranks: int, task: Task, folder: Path, cleanup: contextlib.ExitStack) -> Rank:
    """Start one rank and note in `cleanup` how to end it: by SIGKILL, because it may hang."""
    ours, theirs = _context().Pipe()
    cleanup.enter_context(ours)
    stack = folder / f"stack_{number}"
    stack.touch()
    world = World(number, ranks, folder / "store")
    process = _context().Process(target=_work, args=(world, task, theirs, stack), daemon=True)
    with theirs:  # the parent's copy must close, or a dead rank would never read as an end of file
        process.start()
    cleanup.callback(process.join)
    cleanup.callback(process.kill)
    return Rank(number, process, ours, stack)


def _work(world: World, task: Task, outcome: "Connection[Any, Any]", stack: Path) -> None:
    """Run the task, from the process group's start to its end."""
    with stack.open("w") as file:
        faulthandler.enable(file)
        # chain: after printing, the signal takes its usual effect and ends the process, so the parent sees it is done.
        faulthandler.register(signal.SIGUSR1, file, all_threads=True, chain=True)
        torch.set_num_threads(1)
        random.seed(0)
        torch.manual_seed(0)
        try:
            function = vars(importlib.import_module(task.module))[task.name]
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(str(world.store), world.size),
                rank=world.rank,
                world_size=world.size,
                # Longer than the parent's patience: a hang shall end with all stacks, not with one rank's timeout.
                timeout=timedelta(seconds=2 * task.timeout),
            )
            result = function(world, *pickle.loads(task.arguments))
            message: tuple[bytes | None, str] = (pickle.dumps(result), "")
        except BaseException:
            message = (None, traceback.format_exc())
        outcome.send_bytes(pickle.dumps(message))
        # Stay until the parent, which waits for every rank, ends them all: sockets that close now would break a
        # collective that a slower rank is still in, and hide a collective that this rank left out.
        outcome.poll(None)


def _collect(members: list[Rank], timeout: float) -> dict[int, bytes]:
    """Return the pickled result of every rank."""
    __tracebackhide__ = True
    deadline = time.monotonic() + timeout
    waiting = {member.outcome: member for member in members}
    results: dict[int, bytes] = {}
    failures: list[str] = []
    while waiting:
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for outcome in [outcome for outcome in waiting if outcome in ready]:
            member = waiting.pop(outcome)
            result, failure = member.receive()
            if result is not None:
                results[member.number] = result
                continue
            if not failures:
                deadline = min(deadline, time.monotonic() + SECONDS_FOR_OTHERS)
            failures.append(f"rank {member.number} of {len(members)} failed:\n{failure}")
    if failures:
        raise RanksFailed("\n".join(failures))
    if waiting:
        raise RanksFailed(_describe_hang(waiting.values(), sorted(results), timeout))
    return results


def _describe_hang(hung: Iterable[Rank], returned: list[int], timeout: float) -> str:
    """End the hung ranks; return a report with the stack of each."""
    running = {member.process.sentinel: member for member in hung}
    for member in running.values():
        if member.process.is_alive() and member.process.pid is not None:
            os.kill(member.process.pid, signal.SIGUSR1)
    deadline = time.monotonic() + SECONDS_FOR_STACKS
    alive = set(running)
    while alive and (ended := wait(list(alive), max(0.0, deadline - time.monotonic()))):
        alive -= {sentinel for sentinel in alive if sentinel in ended}
    lines = [f"no end after {timeout:g} s; ranks that had returned: {returned}"]
    for member in running.values():
        lines.append(f"rank {member.number} was here:\n{member.stack.read_text() or '(at its start)'}")
    return "\n".join(lines)
