"""Every Triton kernel compiles for Hopper."""

import json
from pathlib import Path

from shoestring.tests.trainer.precision.kernel_process import run

KERNELS = (
    "quantize_rowwise", "quantize_columnwise", "swiglu_quantize_rowwise", "swiglu_quantize_columnwise",
    "quantize_weight", "rowwise_to_columnwise", "grouped_gemm", "grouped_wgrad_gemm",
)  # fmt: skip
SPILLING = ("quantize_weight", "grouped_gemm")


def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    """No spills where widths are multiples of 16; otherwise two of them spill, as `kernels.py` says."""
    found = [json.loads(line) for line in run("compiled", tmp_path=tmp_path, interpret=False).splitlines()]
    assert {(each["kernel"], each["whole"]) for each in found} == {
        (name, whole) for name in KERNELS for whole in (True, False)
    }
    for each in found:
        print(each)
        spills = each["stack"] or each["local"]
        assert not spills or (not each["whole"] and each["kernel"] in SPILLING), each
        assert each["shared"] <= 227 * 1024, each  # the limit of one thread block on Hopper
        assert each["wgmma"] == (each["kernel"] in ("grouped_gemm", "grouped_wgrad_gemm")), each
