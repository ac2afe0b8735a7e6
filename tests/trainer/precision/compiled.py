"""Compiles every Triton kernel for sm_90 without a GPU, and prints the compiler's resource use as JSON lines.

Needs a process without TRITON_INTERPRET.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shoestring.trainer.precision import kernels

FP8, FP32, BF16, INDEX = "*fp8e4nv", "*fp32", "*bf16", "*i32"
INT = "i32"
WIDTHS = {"rows": INT, "width": INT, "tiles": INT, "n": INT, "k": INT}
SPANS = {"first_ptr": INDEX, "last_ptr": INDEX, "expert_ptr": INDEX, "first_tile_ptr": INDEX}
COUNTS = {"row_blocks": INT, "blocks": INT, "n_blocks": INT, "k_blocks": INT}
QUANTIZED = {"values_ptr": FP8, "scales_ptr": FP32, "x_scales_ptr": FP32, "w_ptr": FP8, "w_scales_ptr": FP32}
FACTORS = {"a_ptr": FP8, "b_ptr": FP8, "a_scales_ptr": FP32, "b_scales_ptr": FP32}
SWIGLU = {"gate_up_ptr": BF16, "gates_ptr": FP32}
TYPES = WIDTHS | SPANS | COUNTS | QUANTIZED | FACTORS | SWIGLU

# Kernel, types that differ between kernels, constants, warps.
CASES: list[tuple[Any, dict[str, str], dict[str, Any], int]] = [
    *(
        (kernel, {"x_ptr": source}, {"power_of_two": power, **constants}, warps)
        for kernel, constants, warps in (
            (kernels.quantize_rowwise, {"ROWS": 16}, 4),
            (kernels.quantize_columnwise, {"COLUMNS": 64}, 8),
            (kernels.quantize_weight, {}, 8),
        )
        for source in (BF16, FP32)
        for power in (False, True)
    ),
    *(
        (kernel, {}, {"power_of_two": power, **constants, **gates}, warps)
        for kernel, constants, warps in (
            (kernels.swiglu_quantize_rowwise, {"ROWS": 16}, 4),
            (kernels.swiglu_quantize_columnwise, {"COLUMNS": 64}, 8),
        )
        for gates in ({}, {"gates_ptr": None})
        for power in (False, True)
    ),
    *(
        (kernels.rowwise_to_columnwise, {"x_ptr": FP8}, {"power_of_two": power, "COLUMNS": 64}, 8)
        for power in (False, True)
    ),
    *((kernels.grouped_gemm, {"x_ptr": FP8, "out_ptr": out}, {"ROWS": 128, "COLUMNS": 128}, 8) for out in (BF16, FP32)),
    (kernels.grouped_wgrad_gemm, {"out_ptr": FP32}, {"ROWS": 128, "COLUMNS": 128}, 8),
]


def compiled(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, *, whole: bool = True
) -> dict[str, Any]:
    """Compile a kernel; `whole` means widths that are multiples of 16."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else (TYPES | types)[name] for name in names}
    # Like the launcher for arguments that are multiples of 16.
    aligned = [["tt.divisibility", 16]]
    attributes = {(place,): aligned for place, name in enumerate(names) if signature[name].startswith("*")}
    if whole:
        attributes |= {(names.index(name),): aligned for name in ("n", "k", "width") if name in names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=attributes,
    )
    options = {"num_warps": warps, "num_stages": 3}
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return {
        "kernel": kernel.__name__,
        "constants": {**types, **constants},
        "whole": whole,
        "wgmma": "wgmma.mma_async.sync.aligned" in binary.asm["ptx"] and "e4m3.e4m3" in binary.asm["ptx"],
        "shared": binary.metadata.shared,
        **resources(binary.asm["cubin"]),
    }


def resources(cubin: bytes) -> dict[str, int]:
    """Return registers, and bytes of stack and local memory, to which registers are spilled."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", said.stdout + said.stderr))
    return {name.lower(): int(value) for name, value in found.items()}


if __name__ == "__main__":
    for case in CASES:
        print(json.dumps(compiled(*case)), flush=True)
    for case in {case[0].__name__: case for case in CASES}.values():
        print(json.dumps(compiled(*case, whole=False)), flush=True)
