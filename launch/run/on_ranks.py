"""Run a function on several ranks of this machine, each a process, and return the result of each.

def work(rank: RankContext, factor: int) -> int:
    value = torch.tensor(rank.rank * factor, device=rank.device)
    torch.distributed.all_reduce(value)  # the default group is open: NCCL on GPUs, gloo elsewhere
    return int(value)

if __name__ == "__main__":  # the ranks import a script whose function they run
    print(run_on_ranks(work, 10, ranks=4))  # [60, 60, 60, 60]
"""

import pickle
import tempfile
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import spawn
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ...comm.bootstrap import TorchrunEnvironment, init_default_process_group
from ...comm.group_factory import build_group_factory
from ...comm.groups import ProcessGroups
from ...comm.topology import Topology
from ...comm.watchdog import Watchdog
from ..console import print_to_stderr
from .rank_environment import uses_gpus
from .torchrun import RANK_MODULE_ARGUMENTS, run_local_ranks

A = TypeVar("A")
R = TypeVar("R")

RankStarter = Callable[[Sequence[str], int, float], None]
"""Runs `python ARGUMENTS` as this many ranks, to the end; raises `RanksFailed`, also after this many seconds."""

_CALL_FILE = "call"
_is_importing_script = False


@dataclass(frozen=True, kw_only=True)
class RankContext(TorchrunEnvironment):
    """This rank, for the function that runs on it. torch's default process group is open."""

    device: torch.device
    """Device of this rank: the GPU with its local number, or the CPU."""
    timeout: timedelta
    """Longest time that a collective may take."""

    def open_groups(
        self, topology: Topology, shared_pp_ranks: Iterable[tuple[int, ...]] = (), watchdog: Watchdog | None = None
    ) -> ProcessGroups:
        """Create the groups of `topology`; collective over all ranks. See `ProcessGroups.create`."""
        factory = build_group_factory(self.device, self.rank, self.timeout)
        return ProcessGroups.create(topology, self.rank, self.timeout, shared_pp_ranks, factory, watchdog)


def pick_device(wanted: str, worker: TorchrunEnvironment) -> torch.device:
    """Return the device of this rank for `wanted`: cpu, cuda, or `auto`, a GPU if every rank of this machine gets one.

    The GPU becomes the current one, with the settings of a training run.
    """
    if not uses_gpus(wanted, worker.local_world_size):
        return torch.device("cpu")
    device = torch.device("cuda", worker.local_rank)
    torch.cuda.set_device(device)
    # With the reduced-precision default, cuBLAS adds the parts of a split-K product in BF16.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return device


def run_on_ranks(
    function: Callable[[RankContext, A], R],
    argument: A,
    ranks: int,
    *,
    device: str = "auto",
    timeout: timedelta = timedelta(minutes=2),
    seconds: float = 600.0,
    start: RankStarter = run_local_ranks,
) -> list[R]:
    """Run `function(rank, argument)` on `ranks` ranks; return the results in the order of ranks.

    Args:
        function: a function at the top level of a module that this process can import, or of the script that runs.
        argument: any value that can be pickled, as each result must be.
        ranks: number of processes.
        device: cpu, cuda (a GPU for each rank), or auto: GPUs if there is one for each rank.
        timeout: longest time for the ranks to connect, and for a collective.
        seconds: time limit of the whole call.
        start: starts the ranks; another starter is `SimulatedCluster.run_ranks`.

    Raises `ValueError` for a function or an argument that no other process can load, and `RanksFailed` if a rank
    fails, with its traceback on standard error, or after `seconds`. No process is left behind.
    """
    if _is_importing_script:
        raise RuntimeError(
            "a rank imported the script and called run_on_ranks; put the call under if __name__ == '__main__':"
        )
    if ranks < 1:
        raise ValueError(f"ranks = {ranks}: must be at least 1")
    imports, pickled = _pickle_for_ranks(function, argument)
    with tempfile.TemporaryDirectory(prefix="shoestring_") as folder:
        Path(folder, _CALL_FILE).write_bytes(pickle.dumps((imports, pickled, device, timeout)))
        start([*RANK_MODULE_ARGUMENTS, f"{__name__}:run_call", folder], ranks, seconds)
        return [pickle.loads(_result_path(Path(folder), rank).read_bytes()) for rank in range(ranks)]


def _pickle_for_ranks(function: Callable[..., Any], argument: object) -> tuple[dict[str, Any], bytes]:
    """Return where a rank imports from, as `multiprocessing.spawn.prepare` takes it, and what it can load after it."""
    try:
        pickled = pickle.dumps((function, argument))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        hint = "functions and classes must be at the top level of a module"
        raise ValueError(f"other processes cannot load the function or its argument ({error}); {hint}") from error
    keys = ["sys_path"]
    if b"__main__" in pickled:  # else the ranks need not import the program, which may take seconds
        keys += ["init_main_from_name", "init_main_from_path"]
    known = spawn.get_preparation_data("rank")
    imports = {key: known[key] for key in keys if key in known}
    if len(keys) > 1 and len(imports) == 1:
        raise ValueError("other processes cannot load a function of an interactive session; write it to a file")
    return imports, pickled


def run_call(folder: Path) -> int:
    """Run one rank of `run_on_ranks`, which torchrun has started, and write its result; return the exit code."""
    global _is_importing_script
    worker = TorchrunEnvironment.read()
    assert worker is not None
    try:
        imports, pickled, wanted, timeout = pickle.loads((folder / _CALL_FILE).read_bytes())
        _is_importing_script = True
        spawn.prepare(imports)
        function, argument = pickle.loads(pickled)
        _is_importing_script = False
        device = pick_device(wanted, worker)
        init_default_process_group(worker, device, timeout)
        result = function(RankContext(**vars(worker), device=device, timeout=timeout), argument)
        _result_path(folder, worker.rank).write_bytes(pickle.dumps(result))
        dist.destroy_process_group()
    except Exception:
        print_to_stderr(f"rank {worker.rank}: {traceback.format_exc()}")
        return 1
    return 0


def _result_path(folder: Path, rank: int) -> Path:
    return folder / f"result_{rank}"
