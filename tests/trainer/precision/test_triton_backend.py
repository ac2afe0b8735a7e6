"""The Triton kernels without a GPU: in the interpreter they equal the reference, and Triton compiles them for Hopper.

Each in a process of its own: the interpreter is chosen when triton is imported.
"""

from pathlib import Path

import numpy as np
import pytest
from numpy.lib import NumpyVersion

from shoestring.tests.trainer.precision.kernel_process import run

triton = pytest.importorskip("triton")


def has_broken_interpreter() -> bool:
    """Triton before 3.7 takes a loop bound for an array, which NumPy since 2.4 does not convert to an integer."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return version < (3, 7) and NumpyVersion(np.__version__) >= "2.4.0"


def test_every_quantizer_equals_the_reference_in_the_interpreter(tmp_path: Path) -> None:
    assert (
        run("against_reference", "quantization", tmp_path=tmp_path, interpret=True).strip()
        == "every kernel equals the reference"
    )


@pytest.mark.skipif(has_broken_interpreter(), reason="triton's interpreter before 3.7 cannot loop with NumPy 2.4")
def test_every_product_equals_the_reference_in_the_interpreter(tmp_path: Path) -> None:
    assert (
        run("against_reference", "products", tmp_path=tmp_path, interpret=True).strip()
        == "every kernel equals the reference"
    )
