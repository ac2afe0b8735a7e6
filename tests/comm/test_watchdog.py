"""A call into the communication library that does not return is reported, and ends its rank."""

import pickle
from datetime import timedelta
from io import TextIOWrapper
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from shoestring.comm.groups import ProcessGroups
from shoestring.comm.topology import Topology
from shoestring.comm.watchdog import Watchdog
from shoestring.tests.comm.nccl_rules import QueuedStreams, RulesGroups
from shoestring.tests.processes import RanksFailed, World, run_processes

DUMP = "shoestring.comm.watchdog._find_dump"
RECORDED = pickle.dumps({"entries": [{"profiling_name": "nccl:send 0->1"}]})


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A watchdog of rank 3 with a limit of 10 s, a manual clock, and an exit that is only recorded."""

    def __init__(self, folder: Path) -> None:
        self.clock, self.ends = Clock(), list[int]()
        self.folder, self._path = folder / "flight_recorder", folder / "said"
        self._file: TextIOWrapper = self._path.open("w")
        self.watchdog = Watchdog(
            3, timedelta(seconds=10), self.folder, clock=self.clock, exit_process=self.ends.append, output=self._file
        )

    @property
    def said(self) -> str:
        self._file.flush()
        return self._path.read_text()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_call_that_returns_in_time_is_nothing(bench: Bench) -> None:
    for _ in range(2):
        with bench.watchdog.watch_call("dispatch of layer_03, micro-batch 1", (2, 3)):
            bench.clock.now += 9
            bench.watchdog.exit_if_overdue()
    bench.clock.now += 100
    bench.watchdog.exit_if_overdue()
    assert (bench.ends, bench.said) == ([], "")


def test_a_call_that_does_not_return_is_named_with_its_peers_and_ends_the_rank(bench: Bench) -> None:
    with bench.watchdog.watch_call("dispatch of layer_03, micro-batch 1", (1, 2, 3)), patch(DUMP, lambda: None):
        bench.clock.now = 10.5
        bench.watchdog.exit_if_overdue()
    assert bench.ends == [1]
    first, *rest = bench.said.splitlines()
    assert first == (
        "shoestring: rank 3: dispatch of layer_03, micro-batch 1 with ranks 1, 2 has not returned from the"
        " communication library for 10 s (limit 10 s)"
    )
    assert any("test_watchdog.py" in line for line in rest)  # the stack of this thread
    assert rest[-1] == f"shoestring: rank 3: PyTorch {torch.__version__} has no flight recorder"


def test_of_many_peers_some_are_named(bench: Bench) -> None:
    with bench.watchdog.watch_call("first all-reduce", range(2048)):
        bench.clock.now = 11
        bench.watchdog.exit_if_overdue()
    assert "with ranks 0, 1, 2, 4, 5, 6, 7, 8 and 2039 more has" in bench.said


def test_the_limit_may_change_while_a_call_is_under_way(bench: Bench) -> None:
    bench.watchdog.timeout = timedelta(seconds=100)
    with bench.watchdog.watch_call("first all-reduce", (0, 3)):
        bench.clock.now = 50
        bench.watchdog.exit_if_overdue()
        assert not bench.ends
        bench.watchdog.timeout = timedelta(seconds=10)
        bench.watchdog.exit_if_overdue()
    assert bench.ends == [1]


@pytest.mark.parametrize(
    ("recorded", "words"),
    [
        (RECORDED, "flight recorder, 1 entries, is in"),
        (pickle.dumps({"entries": []}), "is empty; to have it record, set TORCH_FR_BUFFER_SIZE=2000"),
        (b"", "could not be written: Ran out of input"),
    ],
    ids=["recorded", "empty", "broken"],
)
def test_the_flight_recorder_is_written_or_the_reason_is_printed(bench: Bench, recorded: bytes, words: str) -> None:
    with bench.watchdog.watch_call("first all-reduce", (0, 3)), patch(DUMP, lambda: lambda: recorded):
        bench.clock.now = 11
        bench.watchdog.exit_if_overdue()
    assert words in bench.said.splitlines()[-1]
    written = bench.folder / "rank_3"
    assert (written.read_bytes() if written.exists() else None) == (RECORDED if recorded == RECORDED else None)
    assert bench.ends == [1]


def hang_alone(world: World, folder: Path) -> None:
    """Start a first all-reduce on rank 0 that rank 1 never starts."""
    limit, streams = timedelta(seconds=60), QueuedStreams()
    with (folder / f"said_{world.rank}").open("w") as said:
        watchdog = Watchdog(world.rank, timedelta(seconds=0.2), folder, output=said)
        watchdog.start(0.05)
        make = RulesGroups(world.rank, limit, streams, limit)
        groups = ProcessGroups.create(Topology(ep=2), world.rank, limit, group_factory=make, watchdog=watchdog)
        if world.rank == 0:
            groups.world.all_reduce_sum(torch.zeros(1), "count of valid targets")


def test_a_rank_that_hangs_in_a_first_contact_ends(tmp_path: Path) -> None:
    with pytest.raises(RanksFailed, match=r"rank 0 of 2 failed:\ndied with exit code 1"):
        run_processes(2, hang_alone, tmp_path)
    said = (tmp_path / "said_0").read_text()
    assert said.startswith("shoestring: rank 0: count of valid targets with ranks 1 has not returned")
    assert " in _meet" in said
