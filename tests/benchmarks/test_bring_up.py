"""benchmarks/bring_up.py on a CPU: its rows, and what it says of what is missing, wrong or broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from shoestring.benchmarks import bring_up
from shoestring.benchmarks.rows import providers
from shoestring.benchmarks.rows.row import Check, Figures, Machine, NotHere, Verdict, expect, run_check
from shoestring.comm.groups import Group
from shoestring.tests.tree import ROOT

ALONE = Group((0,), None, 0, timedelta(seconds=1))
CPU = Machine(torch.device("cpu"), ALONE, ALONE, ALONE, None)
NETWORK = [f"{name}, {where}" for name in ("all_reduce", "all_to_all") for where in ("all ranks", "inside the node")]
BETWEEN = ["all_reduce, between nodes", "all_to_all, between nodes"]
ON_CPU = {"host", "matmul bf16", "grouped_mm, rows in eights", "grouped_mm, any rows", "training step, tiny, bf16"}


@dataclass(frozen=True)
class Run:
    code: int
    text: str
    rows: dict[str, dict[str, object]]

    def that(self, verdict: Verdict) -> set[str]:
        return {name for name, row in self.rows.items() if row["verdict"] == verdict}


def run(tmp_path: Path, *launcher: str) -> Run:
    path = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "benchmarks" / "bring_up.py"), "--json", str(path)],
        capture_output=True,
        text=True,
        timeout=120,
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
    assert result.that(Verdict.WORKS) == ON_CPU
    assert result.that(Verdict.FAILS) == set()
    assert len(result.rows) == len(bring_up.CHECKS)
    assert all(f"{row['verdict']:9} {name}" in result.text for name, row in result.rows.items())
    assert result.rows["gpu"]["reason"] == "torch sees no GPU"


@pytest.mark.slow
def test_two_processes_of_one_node(tmp_path: Path) -> None:
    result = run(tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    assert result.code == 0
    assert result.that(Verdict.WORKS) == ON_CPU | set(NETWORK)
    assert result.that(Verdict.NOT_HERE) >= set(BETWEEN)
    figures = result.rows["all_to_all, all ranks"]["figures"]
    assert isinstance(figures, list)
    assert len(figures) == 2  # those of each rank


def test_a_failing_row_is_a_finding() -> None:
    def broken(machine: Machine) -> Figures:
        raise RuntimeError("no kernel image\nis available")

    def inexact(machine: Machine) -> Figures:
        return {"error": expect("the product", float("nan"), 1e-2)}

    def absent(machine: Machine) -> Figures:
        raise NotHere("apex is not installed")

    outcomes = [run_check(Check("row", row, mandatory=True), CPU) for row in (broken, inexact, absent)]
    assert [outcome.verdict for outcome in outcomes] == [Verdict.FAILS, Verdict.FAILS, Verdict.NOT_HERE]
    assert outcomes[0].reason == "RuntimeError: no kernel image is available"
    assert "the product is off by nan, more than 0.01" in outcomes[1].reason


@pytest.mark.parametrize("mandatory", [True, False])
def test_a_mandatory_failure_fails_the_script_after_all_rows(
    mandatory: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(machine: Machine) -> Figures:
        raise RuntimeError("broken")

    def fine(machine: Machine) -> Figures:
        return {"GB/s": 1.0}

    monkeypatch.setattr(bring_up, "CHECKS", (Check("first", broken, mandatory), Check("second", fine, mandatory=True)))
    monkeypatch.setattr(sys, "argv", ["bring_up.py"])
    monkeypatch.delenv("RANK", raising=False)
    assert bring_up.main() == int(mandatory)
    text = capsys.readouterr().out
    assert "GB/s 1" in text
    assert ("mandatory and failed: first" in text) == mandatory


def test_pypis_apex_is_told_from_nvidias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise SystemExit('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(NotHere, match="not NVIDIA's"):
        providers.apex_adam(CPU)
    (tmp_path / "apex" / "optimizers").mkdir()
    with pytest.raises(NotHere, match="no GPU"):
        providers.apex_adam(CPU)
