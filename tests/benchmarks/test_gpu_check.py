"""benchmarks/gpu_check.sh without a GPU and with no time: what it reports for each part, and its exit code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shoestring.benchmarks import environment
from shoestring.benchmarks.compare_losses import compare
from shoestring.tests.tree import ROOT

PARTS = [
    "environment", "doctor", "bring_up", "data", "train_cpu", "train_bf16", "train_fp8", "gpu_tests", "fp8_kernels",
    "v3_layer", "memory",
]  # fmt: skip
ON_GPU = PARTS[5:]


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / "benchmarks" / "gpu_check.sh"), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable},
    )


def test_it_lists_its_parts() -> None:
    done = check("--list")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == PARTS


def test_what_does_not_fit_is_skipped_and_fails_where_it_is_mandatory(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = check("--seconds", "1", "--out", str(out))
    assert done.returncode == 1, done.stderr
    lines = (out / "summary.txt").read_text().splitlines()
    verdicts = {line.split(" code ")[1].split()[1]: line[:9].strip() for line in lines[:-1]}
    assert verdicts == {name: "not here" if name in ON_GPU else "skipped" for name in PARTS}
    assert "torch sees no GPU" in lines[-2]
    assert lines[-1].startswith("mandatory parts failed or skipped: environment doctor bring_up data train_cpu;")


@pytest.mark.parametrize("arguments", [("--seconds",), ("--seconds", "soon"), ("--everything",)])
def test_arguments_that_it_does_not_know(arguments: tuple[str, ...]) -> None:
    done = check(*arguments)
    assert done.returncode == 2
    assert "--wheels DIR" in done.stderr


def test_every_import_of_a_command_is_looked_for() -> None:
    """The script's commands start with these packages and torch alone; other imports are an error."""
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "import shoestring.launch.cli, shoestring.launch.run.launcher, shoestring.launch.run.worker\n"
        "import shoestring.launch.verbs.doctor, shoestring.launch.verbs.memory, shoestring.launch.answers.terminal\n"
        "import shoestring.trainer.data.preparation.prepare\n"
        "known = {name.split('.')[0] for name in before} | set(sys.stdlib_module_names) | {'shoestring'}\n"
        "print(*{name.split('.')[0] for name in sys.modules} - known)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    compiled = ("_cython", "cython_runtime", "_yaml")  # parts of PyYAML
    optional = {"attr"}  # rich imports it if it is there
    found = {name for name in done.stdout.split() if not name.startswith(compiled)} - optional
    assert found <= set(environment.IMPORTED)


def test_losses_are_compared_step_by_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare({1: 2.0, 2: 1.01}, {1: 2.0, 2: 1.0}) == pytest.approx(0.01)
    assert "difference 1.00%" in capsys.readouterr().out
    assert compare({1: 2.0}, {1: 2.0, 2: 1.0}) == float("inf")
    assert compare({1: float("nan")}, {1: 2.0}) == float("inf")
    assert compare({}, {}) == float("inf")
