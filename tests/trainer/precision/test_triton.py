"""The Triton kernels without a GPU: in the interpreter they are their twins, and a compiler for Hopper accepts them.

Each in a process of its own: the interpreter is chosen when triton is imported.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(module: str, tmp_path: Path, *, interpret: bool) -> str:
    # What the compiler may fuse is said, since its default changes; caches of one user's runs are not this test's.
    chosen = {"TRITON_DEFAULT_FP_FUSION": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | chosen
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-P", "-m", f"shoestring.tests.trainer.precision.{module}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_kernel_is_its_twin_in_the_interpreter(tmp_path: Path) -> None:
    assert run("against_twins", tmp_path, interpret=True).strip() == "every kernel is its twin"


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper_without_spills(tmp_path: Path) -> None:
    found = [json.loads(line) for line in run("compiled", tmp_path, interpret=False).splitlines()]
    assert {each["kernel"] for each in found} == {
        "quantise_rows", "quantise_columns", "quantise_swiglu_rows", "quantise_swiglu_columns", "quantise_blocks",
        "multiply", "outer",
    }  # fmt: skip
    for each in found:
        print(each)
        assert each["stack"] == each["local"] == 0, each
        assert each["shared"] <= 227 * 1024, each  # what one block of threads may have on Hopper
        assert each["wgmma"] == (each["kernel"] in ("multiply", "outer")), each
