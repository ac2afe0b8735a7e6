"""A function on several ranks: of a module, of a script, one that fails, and those that no rank can load."""

import subprocess
import sys
from pathlib import Path

import pytest

from shoestring.launch.run import on_ranks
from shoestring.launch.run.on_ranks import RankContext, run_on_ranks

SCRIPT = """
from dataclasses import dataclass
from pathlib import Path
import os
import torch
from shoestring.comm.topology import Topology
from shoestring.launch.run.on_ranks import run_on_ranks
from shoestring.launch.run.torchrun import RanksFailed

@dataclass
class Factor:
    value: int

def work(rank, factor):
    here = torch.tensor(rank.rank * factor.value)
    torch.distributed.all_reduce(here)
    groups = rank.open_groups(Topology(ep=rank.world_size))
    return int(here), rank.rank, rank.world_size, str(rank.device), groups.ep.ranks

def fail(rank, number):
    if rank.rank == number:
        raise LookupError(f"rank {number} lost it")

if __name__ == "__main__":
    print(run_on_ranks(work, Factor(10), 2, device="cpu"))
    try:
        run_on_ranks(fail, 1, 2, device="cpu")
    except RanksFailed as failed:
        print(failed)
"""


def test_functions_of_a_script_in_any_folder(tmp_path: Path) -> None:
    (tmp_path / "token.py").write_text("raise SystemExit('not the module of this name')")  # next to the user's files
    script = tmp_path / "user" / "my script.py"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        str([(10, rank, 2, "cpu", (0, 1)) for rank in range(2)]),
        "a rank failed (torchrun exit code 1); see its messages above",
    ]
    assert "rank 1: Traceback" in done.stderr
    assert "LookupError: rank 1 lost it" in done.stderr


def position(rank: RankContext, _: None) -> int:
    return rank.rank


def test_what_no_rank_can_load_is_refused_before_a_process_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(arguments: object, ranks: int, seconds: float) -> None:
        pytest.fail("a process was started")

    with pytest.raises(ValueError, match="top level of a module"):
        run_on_ranks(lambda rank, _: rank.rank, None, 1, start=start)
    with pytest.raises(ValueError, match="top level of a module"):
        run_on_ranks(position, lambda: None, 1, start=start)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1"):
        run_on_ranks(position, None, 0, start=start)
    monkeypatch.setattr(on_ranks, "_is_importing_script", True)
    with pytest.raises(RuntimeError, match="__name__ == '__main__'"):
        run_on_ranks(position, None, 1, start=start)


def test_a_session_without_a_file_is_refused() -> None:
    code = "from shoestring.launch.run.on_ranks import run_on_ranks\ndef f(rank, _): pass\nrun_on_ranks(f, None, 1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert "ValueError: other processes cannot load a function of an interactive session" in done.stderr
