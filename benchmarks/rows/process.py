"""Process that runs the rows of one rank, separate from the process that waits for them.

A kernel that never ends, or a peer that never answers, holds a thread inside a driver, and nothing in that process can
stop it. So `bring_up.py` only waits and kills: a row that exceeds its limit, or crashes its process, fails, and the
next row runs in a new process. A GPU fault leaves the process without a usable device, so after a row that failed on
any rank all ranks get new processes.
"""

import faulthandler
import multiprocessing
import os
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any

import torch

from shoestring.benchmarks.rows.row import Check, Machine, RankResult, RowStatus, run_check
from shoestring.comm.bootstrap import TorchrunEnvironment, init_default_process_group
from shoestring.comm.group_factory import build_group_factory
from shoestring.comm.groups import Group
from shoestring.launch.run.on_ranks import pick_device
from shoestring.launch.run.signals import die_with_parent

COLLECTIVE = timedelta(minutes=2)
START_SECONDS = 120.0
"""Limit in seconds for a process to open its groups."""
_FOR_STACKS = 2.0  # seconds for a hanging process to print its stacks


class RowProcess:
    """Separate process that runs rows one after the other, restarted when needed."""

    def __init__(self, worker: TorchrunEnvironment | None, start_seconds: float = START_SECONDS) -> None:
        self.device_name = ""
        """Name of the device, once a process has started."""
        self._worker, self._start_seconds = worker, start_seconds
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["shoestring.benchmarks.rows.process"])
        self._process: ForkServerProcess | None = None
        self._end: Connection[Any, Any] | None = None
        self._starts = 0
        self._refused: RankResult | None = None

    def run_check(self, check: Check) -> RankResult:
        """Run one row. After a failed start the process is not started again, since every start costs the limit."""
        if self._process is None and self._refused is None:
            self._refused = self._start()
        if self._refused is not None:
            return self._refused
        assert self._end is not None
        self._end.send(check)
        return self._answer(check.seconds, f"still running after {check.seconds:g} s")

    def close(self) -> None:
        """Kill the process, if there is one; the next row starts a new one."""
        if self._process is not None and self._end is not None:
            self._process.kill()
            self._process.join()
            self._end.close()
        self._process = self._end = None

    def _start(self) -> RankResult | None:
        """Start the process; return a failed result if it did not start."""
        self._end, theirs = self._context.Pipe()
        arguments = (self._worker, self._starts, dict(os.environ), theirs)
        self._process = self._context.Process(target=_serve, args=arguments, daemon=True)
        with theirs:
            self._process.start()
        self._starts += 1
        hello = self._answer(self._start_seconds, f"its process did not start within {self._start_seconds:g} s")
        if hello.status is RowStatus.FAILS:
            return hello
        self.device_name = hello.reason
        return None

    def _answer(self, seconds: float, too_late: str) -> RankResult:
        assert self._process is not None
        assert self._end is not None
        try:
            if self._end.poll(seconds + _FOR_STACKS):
                found: RankResult = self._end.recv()
                return found
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            self.close()
            return RankResult(RowStatus.FAILS, f"its process ended with exit code {code}", None)
        self.close()
        return RankResult(RowStatus.FAILS, too_late, None)


def _serve(
    worker: TorchrunEnvironment | None, start: int, variables: dict[str, str], end: "Connection[Any, Any]"
) -> None:
    """Run the received rows until the parent has gone. Print all stacks if a row exceeds its limit."""
    die_with_parent()
    os.environ.update(variables)  # the forkserver has the variables of an earlier time
    if worker is not None:
        # Separate keys in torchrun's store, whose server runs in the waiting process or in torchrun.
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        os.environ["TORCHELASTIC_RESTART_COUNT"] = f"{variables.get('TORCHELASTIC_RESTART_COUNT', 0)}_rows_{start}"
    machine = open_machine(worker)
    torch.manual_seed(machine.world.rank)
    end.send(RankResult(RowStatus.WORKS, torch.cuda.get_device_name(machine.device) if machine.on_gpu else "cpu", None))
    while True:
        try:
            check: Check = end.recv()
        except EOFError:
            return
        faulthandler.dump_traceback_later(check.seconds)
        found = run_check(check, machine)
        faulthandler.cancel_dump_traceback_later()
        end.send(found)


def open_machine(worker: TorchrunEnvironment | None) -> Machine:
    """Open this rank's device, and its groups under torchrun.

    Groups and settings are those of a training run: what a row certifies is what training meets.
    """
    device = pick_device("cuda" if torch.cuda.is_available() else "cpu", worker or TorchrunEnvironment(0, 0, 1))
    if worker is None:
        alone = Group((0,), None, 0, COLLECTIVE)
        return Machine(device, alone, alone, alone)
    init_default_process_group(worker, device, COLLECTIVE)
    size, local = worker.world_size, worker.local_world_size
    node = [tuple(range(first, first + local)) for first in range(0, size, local)]
    rail = [tuple(range(first, size, local)) for first in range(local)]
    make = build_group_factory(device, worker.rank, COLLECTIVE)

    def mine(name: str, parts: Sequence[tuple[int, ...]]) -> Group:
        several = [ranks for ranks in parts if len(ranks) > 1]
        communicator = make.split_group(name, several, None) if several else None
        own = next(ranks for ranks in parts if worker.rank in ranks)
        return Group(own, communicator, worker.rank, COLLECTIVE)

    return Machine(device, mine("all", [tuple(range(size))]), mine("node", node), mine("rail", rail))
