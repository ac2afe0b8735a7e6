"""Rows that need one device: its facts, matrix products, streams, FP8.

Letters: M, N, K sides of a matrix product; R rows, L experts, D hidden, F inner width.
"""

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

from shoestring.benchmarks.rows.row import Check, Figures, Machine, NotHere, Wrong, expect, relative_error
from shoestring.parallelism.weight_grad import DelayedWeightGradients
from shoestring.trainer.model.experts import grouped_linear, grouped_mm, grouped_mm_reference

TILE = 128
"""Side of a quantized tile or block (report §3.3.2)."""
E4M3_MAX = 448.0


def host(machine: Machine) -> Figures:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpus": float(len(os.sched_getaffinity(0))),
        "threads": float(torch.get_num_threads()),
    }


def gpu(machine: Machine) -> Figures:
    machine.need_gpu()
    facts = torch.cuda.get_device_properties(machine.device)
    nccl: tuple[int, ...] = torch.cuda.nccl.version()
    return {
        "name": facts.name,
        "memory_GiB": facts.total_memory / 2**30,
        "capability": f"{facts.major}.{facts.minor}",
        "multiprocessors": float(facts.multi_processor_count),
        "driver": _driver(),
        "CUDA": str(torch.version.cuda),
        "NCCL": ".".join(map(str, nccl)),
    }


def _driver() -> str:
    """Return the driver's version, which torch does not report."""
    if shutil.which("nvidia-smi") is None:
        return "unknown: no nvidia-smi here"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.split("\n")[0].strip()


def matmul_bf16(machine: Machine) -> Figures:
    side = 8192 if machine.on_gpu else 512
    a, b = (_normal(machine, side, side).bfloat16() for _ in range(2))
    error = expect("the product", relative_error((a @ b)[:64], a[:64].double() @ b.double()), 1e-2)
    return {"TFLOP/s": _rate(machine, 2 * side**3, lambda: a @ b), "side": float(side), "error": error}


def grouped_in_eights(machine: Machine) -> Figures:
    return _grouped(machine, (1024, 0, 3072, 512, 2048, 8, 1016, 512) if machine.on_gpu else (32, 0, 96, 16))


def grouped_any(machine: Machine) -> Figures:
    """Test row counts of real routing. A kernel that needs 16-byte alignment between experts fails in the backward."""
    return _grouped(machine, (1023, 0, 3071, 513, 2047, 1, 1025, 512) if machine.on_gpu else (31, 0, 97, 16))


def grouped_empty(machine: Machine) -> Figures:
    """Test experts without rows (first, last and adjacent ones), and all rows at one expert."""
    last, one = ((0, 0, 1024, 0, 0, 37, 0, 0), (0, 0, 0, 2048)) if machine.on_gpu else ((0, 0, 24, 0, 5, 0), (0, 0, 9))
    return {f"error_of_{sum(rows_L)}_rows": _grouped_error(machine, rows_L) for rows_L in (last, one)}


def grouped_nothing(machine: Machine) -> Figures:
    """Test a rank that receives no rows for any of its experts."""
    out_RF, grad_RD, *weight_grads = _run_grouped(_grouped_inputs(machine, (0, 0, 0, 0)))
    if len(out_RF) or len(grad_RD):
        raise Wrong(f"no rows became {len(out_RF)} and {len(grad_RD)}")
    expect("a gradient of weights", max(float(grad.abs().max()) for grad in weight_grads), 0)
    return {"weight_gradient": 0.0}


def _grouped(machine: Machine, rows_per_expert_L: tuple[int, ...]) -> Figures:
    """Compare forward and backward of the grouped GEMM with the reference, and time them."""
    error = _grouped_error(machine, rows_per_expert_L)
    inputs = _grouped_inputs(machine, rows_per_expert_L)
    flops = 6 * inputs.x_RD.numel() * inputs.weight_LFD.shape[1]
    rates = (
        _rate(machine, flops, partial(_autograd, product, inputs)) for product in (grouped_mm, grouped_mm_reference)
    )
    return {**dict(zip(("TFLOP/s", "reference_TFLOP/s"), rates, strict=True)), "error": error}


@dataclass(frozen=True)
class _Grouped:
    x_RD: Tensor
    weight_LFD: Tensor
    grad_RF: Tensor
    rows_L: tuple[int, ...]


def _grouped_inputs(machine: Machine, rows_L: tuple[int, ...]) -> _Grouped:
    inner, hidden = (4096, 7168) if machine.on_gpu else (64, 128)
    x_RD = _normal(machine, sum(rows_L), hidden).bfloat16()
    weight_LFD = (_normal(machine, len(rows_L), inner, hidden) * 0.02).bfloat16()
    return _Grouped(x_RD, weight_LFD, _normal(machine, sum(rows_L), inner).bfloat16(), rows_L)


def _grouped_error(machine: Machine, rows_L: tuple[int, ...]) -> float:
    """Return the largest error of the output and all gradients; weight gradients by autograd and as in training."""
    inputs = _grouped_inputs(machine, rows_L)
    out_RF, grad_RD, grad_LFD = _autograd(grouped_mm_reference, inputs)
    names = ("output", "input gradient", "weight gradient", "weight gradient in FP32", "weight gradient in BF16")
    pairs = zip(names, _run_grouped(inputs), (out_RF, grad_RD, grad_LFD, grad_LFD, grad_LFD), strict=True)
    return max(expect(name, relative_error(ours, reference), 1e-2) for name, ours, reference in pairs)


def _run_grouped(inputs: _Grouped) -> tuple[Tensor, ...]:
    """Yield results of autograd, then those of training, which accumulates delayed weight gradients in FP32 or BF16."""
    return *_autograd(grouped_mm, inputs), *(_added_grad(inputs, dtype) for dtype in (torch.float32, torch.bfloat16))


def _autograd(
    product: Callable[[Tensor, Tensor, tuple[int, ...]], Tensor], inputs: _Grouped
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, the gradient of the rows and the gradient of the weights."""
    x, weight = inputs.x_RD.clone().requires_grad_(), inputs.weight_LFD.clone().requires_grad_()
    out_RF = product(x, weight, inputs.rows_L)
    grad_x, grad_weight = torch.autograd.grad(out_RF, (x, weight), inputs.grad_RF)
    return out_RF.detach(), grad_x, grad_weight


def _added_grad(inputs: _Grouped, dtype: torch.dtype) -> Tensor:
    """Return the weight gradient that `grouped_linear` adds to a `.grad` of this dtype."""
    weight = inputs.weight_LFD.clone().requires_grad_()
    weight.grad_dtype = dtype
    weight.grad = torch.zeros_like(weight, dtype=dtype)
    left = DelayedWeightGradients(deferred=True)
    with left.collect_from_forward():
        out_RF = grouped_linear(inputs.x_RD.clone().requires_grad_(), weight, inputs.rows_L)
    out_RF.backward(inputs.grad_RF)
    left.flush()
    return weight.grad


def streams(machine: Machine) -> Figures:
    """Measure a host-to-device copy on a side stream during matrix products; 1 means that the copy costs no time."""
    machine.need_gpu()
    a = _normal(machine, 8192, 8192).bfloat16()
    source = torch.ones(2**28, dtype=torch.uint8, pin_memory=True)
    target = torch.zeros_like(source, device=machine.device)
    side = torch.cuda.Stream(machine.device)

    def compute() -> None:
        for _ in range(8):
            a @ a

    def copy() -> None:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            target.copy_(source, non_blocking=True)

    def both() -> None:
        copy()
        compute()

    alone, copying, together = (machine.seconds(work) for work in (compute, copy, both))
    expect("the copy", float((target != 1).sum().item()), 0)
    hidden = (alone + copying - together) / min(alone, copying)
    return {"overlap": hidden, "copy_GB/s": source.numel() / copying / 1e9, "compute_ms": alone * 1e3}


def fp8_tensor_scales(machine: Machine) -> Figures:
    machine.need_gpu((8, 9))
    a_MK, b_NK = _normal(machine, 4096, 4096), _normal(machine, 4096, 4096)
    scales = [x.abs().amax() / E4M3_MAX for x in (a_MK, b_NK)]
    a8, b8 = ((x / scale).to(torch.float8_e4m3fn) for x, scale in zip((a_MK, b_NK), scales, strict=True))
    recipe = ScalingType.TensorWise

    def multiply() -> Tensor:
        return F.scaled_mm(a8, b8.t(), scales[0], recipe, scales[1], recipe, output_dtype=torch.bfloat16)

    truth_MN = (a8.float() * scales[0]) @ (b8.float() * scales[1]).t()
    error = expect("the product", relative_error(multiply(), truth_MN), 1e-2)
    return {"TFLOP/s": _rate(machine, 2 * 4096**3, multiply), "error": error}


def fp8_block_scales(machine: Machine) -> Figures:
    """Test the report's scaling: activations in 1×128 tiles, weights in 128×128 blocks."""
    machine.need_gpu((9, 0))
    if torch.cuda.get_device_capability(machine.device) >= (10, 0):
        raise NotHere("cuBLAS supports these scales only on compute capability 9.0")
    a8, scale_a, b8, scale_b, truth_MN = scaled_operands(machine)
    # cuBLAS expects both scales with the outer dimension first.
    scale_a, scale_b = scale_a.t().contiguous().t(), scale_b.t()
    tiles, blocks = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128

    def multiply() -> Tensor:
        return F.scaled_mm(a8, b8.t(), scale_a, tiles, scale_b, blocks, output_dtype=torch.bfloat16)

    error = expect("the product", relative_error(multiply(), truth_MN), 1e-2)
    return {"TFLOP/s": _rate(machine, 2 * a8.shape[0] * b8.numel(), multiply), "error": error}


def scaled_operands(machine: Machine) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return a [M, K] in E4M3 with scales [M, K/128], b [N, K] with [N/128, K/128], and the product [M, N] in FP32."""
    side = 4096 if machine.on_gpu else 2 * TILE
    a_MK, b_NK = _normal(machine, side, side), _normal(machine, side, side)
    a8, scale_a = _quantize(a_MK, 1)
    b8, scale_b = _quantize(b_NK, TILE)
    truth_MN = _dequantize(a8, scale_a, 1) @ _dequantize(b8, scale_b, TILE).t()
    return a8, scale_a, b8, scale_b, truth_MN


def _quantize(x_MK: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Return E4M3 values, and one FP32 scale per `rows` × 128 of them."""
    tiles = x_MK.unflatten(1, (-1, TILE)).unflatten(0, (-1, rows))
    scale = tiles.abs().amax(dim=(1, 3)) / E4M3_MAX
    return (tiles / scale[:, None, :, None]).to(torch.float8_e4m3fn).view_as(x_MK), scale


def _dequantize(x_MK: Tensor, scale: Tensor, rows: int) -> Tensor:
    return x_MK.float() * scale.repeat_interleave(rows, 0).repeat_interleave(TILE, 1)


def _normal(machine: Machine, *shape: int) -> Tensor:
    return torch.randn(shape, device=machine.device)


def _rate(machine: Machine, flops: int, work: Callable[[], object]) -> float:
    """Return the rate in TFLOP/s."""
    return flops / machine.seconds(work) / 1e12


CHECKS = (
    Check("host", host, mandatory=True),
    Check("gpu", gpu, mandatory=True),
    Check("matmul bf16", matmul_bf16, mandatory=True),
    Check("grouped_mm, rows in eights", grouped_in_eights, mandatory=True),
    Check("grouped_mm, any rows", grouped_any, mandatory=True),
    Check("grouped_mm, experts without rows", grouped_empty, mandatory=True),
    Check("grouped_mm, no row at all", grouped_nothing, mandatory=True),
    Check("copy during compute", streams, mandatory=True),
    Check("fp8 scaled_mm, tensor scales", fp8_tensor_scales, mandatory=False),
    Check("fp8 scaled_mm, 1x128 and 128x128", fp8_block_scales, mandatory=False),
)
