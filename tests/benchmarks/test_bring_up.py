"""benchmarks/bring_up.py on a CPU: its rows, and what it reports as missing, wrong or broken."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from shoestring.benchmarks import bring_up
from shoestring.benchmarks.rows import providers
from shoestring.benchmarks.rows.process import RowProcess
from shoestring.benchmarks.rows.row import Check, Figures, Machine, NotHere, RowStatus, expect, run_check
from shoestring.comm.bootstrap import TorchrunEnvironment
from shoestring.comm.groups import Group
from shoestring.parallelism.pipeline.schedules.registry import SCHEDULES
from shoestring.tests.benchmarks import endless
from shoestring.tests.tree import ROOT

ALONE = Group((0,), None, 0, timedelta(seconds=1))
CPU = Machine(torch.device("cpu"), ALONE, ALONE, ALONE)
NETWORK = [f"{name}, {where}" for name in ("all_reduce", "all_to_all") for where in ("all ranks", "inside the node")]
BETWEEN = ["all_reduce, between nodes", "all_to_all, between nodes"]
ON_CPU = {
    "host",
    "matmul bf16",
    "grouped_mm, rows in eights",
    "grouped_mm, any rows",
    "grouped_mm, experts without rows",
    "grouped_mm, no row at all",
    "token layout, as on a CPU",
    "router, as on a CPU",
    "cast to E4M3, as on a CPU",
    "FP8 rows on the wire, as on a CPU",
    "E5M6, as on a CPU",
    "attention 192/128, as chosen",
    "training step, tiny, bf16",
}
PIPELINES = {f"pipeline of two, {schedule.name}" for schedule in SCHEDULES}


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """Restore the environment variables that the script sets."""
    with patch.dict(os.environ):
        yield


@dataclass(frozen=True)
class Run:
    code: int
    text: str
    rows: dict[str, dict[str, object]]

    def that(self, status: RowStatus) -> set[str]:
        return {name for name, row in self.rows.items() if row["status"] == status}


def run(tmp_path: Path, *launcher: str) -> Run:
    path = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "benchmarks" / "bring_up.py"), "--json", str(path)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert path.exists(), done.stderr
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    return Run(done.returncode, done.stdout, rows)


@pytest.mark.slow
def test_one_process(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.code == 0
    assert result.that(RowStatus.WORKS) == ON_CPU
    assert result.that(RowStatus.FAILS) == set()
    assert len(result.rows) == len(bring_up.CHECKS)
    assert all(f"{row['status']:9} {name}" in result.text for name, row in result.rows.items())
    assert result.rows["gpu"]["reason"] == "torch sees no GPU"
    assert {result.rows[name]["reason"] for name in PIPELINES} == {"needs two GPUs"}


@pytest.mark.slow
def test_two_processes_of_one_node(tmp_path: Path) -> None:
    result = run(tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    assert result.code == 0
    assert result.that(RowStatus.WORKS) == ON_CPU | set(NETWORK) | PIPELINES
    assert result.that(RowStatus.NOT_HERE) >= set(BETWEEN)
    figures = result.rows["all_to_all, all ranks"]["figures"]
    assert isinstance(figures, list)
    assert len(figures) == 2  # those of each rank


def test_a_failing_row_is_a_finding() -> None:
    def inexact(machine: Machine) -> Figures:
        return {"error": expect("the product", float("nan"), 1e-2)}

    outcomes = [run_check(Check("row", row, mandatory=True), CPU) for row in (endless.broken, inexact, endless.absent)]
    assert [outcome.status for outcome in outcomes] == [RowStatus.FAILS, RowStatus.FAILS, RowStatus.NOT_HERE]
    assert outcomes[0].reason == "RuntimeError: no kernel image is available"
    assert "the error of the product is nan, more than 0.01" in outcomes[1].reason


def test_a_row_without_end_is_killed_and_the_next_one_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """A row that kills its process is handled alike. Rows that work share one process."""
    checks = [
        Check("first", endless.fine, mandatory=True),
        Check("second", endless.fine, mandatory=True),
        Check("hangs", endless.endless, mandatory=True, seconds=0.2),
        Check("dies", endless.killed, mandatory=False),
        Check("raises", endless.broken, mandatory=False),
        Check("last", endless.fine, mandatory=True),
    ]
    path = Path(os.devnull)
    assert bring_up.bring_up(checks, path) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:6]] == ["works", "works", "fails", "fails", "fails", "works"]
    assert lines[2].endswith("still running after 0.2 s")
    assert lines[3].endswith("its process ended with exit code -9")
    assert lines[0].split()[-1] == lines[1].split()[-1] != lines[5].split()[-1]
    assert lines[-1].endswith("mandatory rows failed: hangs")


@pytest.mark.parametrize("mandatory", [True, False])
def test_a_mandatory_failure_fails_the_script_after_all_rows(
    mandatory: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = (Check("first", endless.broken, mandatory), Check("second", endless.fine, mandatory=True))
    assert bring_up.bring_up(checks, None) == int(mandatory)
    assert ("mandatory rows failed: first" in capsys.readouterr().out) == mandatory


def test_a_process_that_does_not_start_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later rows do not wait for it again. Here rank 0 of two waits for a rendezvous store that does not exist."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    process = RowProcess(TorchrunEnvironment.read(), start_seconds=0.5)
    reasons = [process.run_check(Check("row", endless.fine, mandatory=True)).reason for _ in range(2)]
    assert reasons == ["its process did not start within 0.5 s"] * 2
    process.close()


def test_pypis_apex_is_distinguished_from_nvidias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise SystemExit('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(NotHere, match="not NVIDIA's"):
        providers.apex_adam(CPU)
    (tmp_path / "apex" / "optimizers").mkdir()
    with pytest.raises(NotHere, match="no GPU"):
        providers.apex_adam(CPU)
