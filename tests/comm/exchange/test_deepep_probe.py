"""The child process that imports DeepEP, against small packages that stand in for DeepEP and torch."""

import os
import sys
from pathlib import Path

from shoestring.comm.exchange.deepep_probe import probe_deepep_import
from shoestring.tests.comm.exchange.deep_ep_package import GOOD, write_deep_ep


def failure(place: Path, seconds: float = 60.0, **own: str) -> str | None:
    return probe_deepep_import({**os.environ, "PYTHONPATH": str(place), **own}, seconds)


def test_one_that_imports_well(tmp_path: Path) -> None:
    write_deep_ep(tmp_path, GOOD)
    assert failure(tmp_path) is None
    assert "deep_ep" not in sys.modules


def test_the_last_line_of_one_that_does_not(tmp_path: Path) -> None:
    write_deep_ep(tmp_path, "print('hello')\nassert False, 'Invalid NCCL versions: 2.29.7 (loaded)'\n")
    assert failure(tmp_path) == "AssertionError: Invalid NCCL versions: 2.29.7 (loaded)"


def test_one_that_takes_the_process_along(tmp_path: Path) -> None:
    write_deep_ep(tmp_path, "import os\nos.abort()\n")
    assert failure(tmp_path) == "the process that imports it ended with code -6"


def test_one_that_hangs(tmp_path: Path) -> None:
    write_deep_ep(tmp_path, "import threading\nthreading.Event().wait()\n")
    assert failure(tmp_path, seconds=0.5) == "it did not finish within 0.5 s"


def test_an_older_one_and_one_without_a_compiler(tmp_path: Path) -> None:
    old = tmp_path / "old"
    write_deep_ep(old, "class Buffer: ...\n")
    assert "has no attribute 'ElasticBuffer'" in str(failure(old))
    write_deep_ep(tmp_path, GOOD)
    nvcc = str(tmp_path / "nvcc")
    assert failure(tmp_path, EP_JIT_NVCC_COMPILER=nvcc) == (
        f"it compiles its kernels at run time, and {nvcc} does not exist"
    )


def test_the_answer_is_kept(tmp_path: Path) -> None:
    package = write_deep_ep(tmp_path, GOOD)
    assert failure(tmp_path) is None
    (package / "__init__.py").write_text("assert False\n")
    assert failure(tmp_path) is None
    assert failure(tmp_path, CHANGED="1") == "AssertionError"
