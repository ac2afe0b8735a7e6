"""The Triton kernels without a GPU: in the interpreter they are their twins, and a compiler for Hopper accepts them.

Each in a process of its own: the interpreter is chosen when triton is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.lib import NumpyVersion

triton = pytest.importorskip("triton")

KERNELS = (
    "quantize_rows", "quantize_columns", "quantize_swiglu_rows", "quantize_swiglu_columns", "quantize_blocks",
    "turn_tiles", "multiply", "outer",
)  # fmt: skip
SPILLING = ("quantize_blocks", "multiply")


def run(module: str, *arguments: str, tmp_path: Path, interpret: bool) -> str:
    # What the compiler may fuse is said, since its default changes; caches of one user's runs are not this test's.
    chosen = {"TRITON_DEFAULT_FP_FUSION": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | chosen
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-P", "-m", f"shoestring.tests.trainer.precision.{module}", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def has_broken_interpreter() -> bool:
    """Before 3.7 it takes the bound of a loop for an array, of which NumPy since 2.4 makes no integer."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return version < (3, 7) and NumpyVersion(np.__version__) >= "2.4.0"


def test_every_quantizer_is_its_twin_in_the_interpreter(tmp_path: Path) -> None:
    assert run("against_twins", "quantization", tmp_path=tmp_path, interpret=True).strip() == "every kernel is its twin"


@pytest.mark.skipif(has_broken_interpreter(), reason="triton's interpreter before 3.7 cannot loop with NumPy 2.4")
def test_every_product_is_its_twin_in_the_interpreter(tmp_path: Path) -> None:
    assert run("against_twins", "products", tmp_path=tmp_path, interpret=True).strip() == "every kernel is its twin"


def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    """Without spills where widths are multiples of 16; else two of them spill, as `kernels.py` says."""
    found = [json.loads(line) for line in run("compiled", tmp_path=tmp_path, interpret=False).splitlines()]
    assert {(each["kernel"], each["whole"]) for each in found} == {
        (name, whole) for name in KERNELS for whole in (True, False)
    }
    for each in found:
        print(each)
        spills = each["stack"] or each["local"]
        assert not spills or (not each["whole"] and each["kernel"] in SPILLING), each
        assert each["shared"] <= 227 * 1024, each  # what one block of threads may have on Hopper
        assert each["wgmma"] == (each["kernel"] in ("multiply", "outer")), each
