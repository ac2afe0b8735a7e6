"""Rows for each Triton kernel of FP8 training: comparison with the reference, rate at DeepSeek-V3's shapes, and number
of compilations.

Letters: R rows, D hidden, F inner width, L experts; N, K sides of a weight.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from shoestring.benchmarks.rows.exact import hard_numbers
from shoestring.benchmarks.rows.row import Check, Figures, Machine, NotHere, Wrong, expect
from shoestring.trainer.precision.backend import PrecisionBackend, RowsPerExpert, open_backend, unavailable_reasons
from shoestring.trainer.precision.fp8_tensors import ColumnwiseFp8Tensor, ScaleFormat
from shoestring.trainer.precision.reference import ReferenceBackend

FP32 = ScaleFormat.FP32
PRODUCT_ERROR = 2.0**-7
"""Limit relative to the largest value: two units in BF16's last place, far above the error of a 14-bit accumulator."""
OTHER_EXP = 1e-2
"""Share of SwiGLU values that may differ from a CPU's by one E4M3 step, since exp differs."""


@dataclass(frozen=True)
class Operands:
    """Inputs of all kernels."""

    rows_L: RowsPerExpert
    x_RD: Tensor
    """Activations in BF16."""
    gate_up_RF: Tensor
    gates_R: Tensor
    weight_LND: Tensor

    @property
    def hidden(self) -> int:
        """Hidden size D."""
        return self.x_RD.shape[1]

    def to(self, device: torch.device) -> "Operands":
        """Return the inputs on `device`."""
        tensors = (self.x_RD, self.gate_up_RF, self.gates_R, self.weight_LND)
        return Operands(self.rows_L, *(x.to(device) for x in tensors))


Work = Callable[[PrecisionBackend, Operands], Callable[[], object]]
"""Function that prepares a kernel's operands and returns a function that calls it."""


@dataclass(frozen=True)
class Kernel:
    """Test of one kernel of `trainer/precision/kernels.py`."""

    name: str
    work: Work
    amount: Callable[[Operands], int]
    """FLOPs of a GEMM, bytes of a quantization."""
    has_exp: bool = False

    @property
    def is_product(self) -> bool:
        return self.name in ("grouped_gemm", "grouped_wgrad_gemm")


def _columns(provider: PrecisionBackend, o: Operands) -> tuple[ColumnwiseFp8Tensor, ColumnwiseFp8Tensor]:
    return provider.quantize_columnwise(o.gate_up_RF, o.rows_L, FP32), provider.quantize_columnwise(
        o.x_RD, o.rows_L, FP32
    )


def _turn(provider: PrecisionBackend, o: Operands) -> Callable[[], object]:
    tiles = provider.quantize_rowwise(o.x_RD, FP32)
    return lambda: provider.rowwise_to_columnwise(tiles, o.rows_L, FP32)


def _multiply(provider: PrecisionBackend, o: Operands) -> Callable[[], object]:
    tiles, blocks = provider.quantize_rowwise(o.x_RD, FP32), provider.quantize_weight(o.weight_LND, FP32)
    return lambda: provider.grouped_gemm(tiles, blocks, o.rows_L, torch.bfloat16)


def _outer(provider: PrecisionBackend, o: Operands) -> Callable[[], object]:
    grad, x = _columns(provider, o)
    sums = o.x_RD.new_zeros((len(o.rows_L), o.gate_up_RF.shape[1], o.hidden), dtype=torch.float32)

    def add() -> Tensor:
        provider.accumulate_grouped_wgrad(grad, x, sums)
        return sums

    return add


def _product_flops(o: Operands) -> int:
    return 2 * len(o.x_RD) * o.gate_up_RF.shape[1] * o.hidden


KERNELS = (
    Kernel("quantize_rowwise", lambda p, o: lambda: p.quantize_rowwise(o.x_RD, FP32), lambda o: 3 * o.x_RD.numel()),
    Kernel(
        "swiglu_quantize_rowwise",
        lambda p, o: lambda: p.swiglu_quantize_rowwise(o.gate_up_RF, o.gates_R, FP32),
        lambda o: 5 * o.gate_up_RF.numel() // 2,
        has_exp=True,
    ),
    Kernel(
        "quantize_columnwise",
        lambda p, o: lambda: p.quantize_columnwise(o.x_RD, o.rows_L, FP32),
        lambda o: 3 * o.x_RD.numel(),
    ),
    Kernel(
        "swiglu_quantize_columnwise",
        lambda p, o: lambda: p.swiglu_quantize_columnwise(o.gate_up_RF, o.gates_R, o.rows_L, FP32),
        lambda o: 5 * o.gate_up_RF.numel() // 2,
        has_exp=True,
    ),
    Kernel("rowwise_to_columnwise", _turn, lambda o: 2 * o.x_RD.numel()),
    Kernel(
        "quantize_weight",
        lambda p, o: lambda: p.quantize_weight(o.weight_LND, FP32),
        lambda o: 3 * o.weight_LND.numel(),
    ),
    Kernel("grouped_gemm", _multiply, _product_flops),
    Kernel("grouped_wgrad_gemm", _outer, _product_flops),
)


def kernel_row(name: str, machine: Machine) -> Figures:
    """Compare, then time a kernel; unlike in `benchmarks/fp8_kernels.py` the time includes the call on the host."""
    need_triton(machine)
    kernel = next(each for each in KERNELS if each.name == name)
    provider = open_backend("triton", machine.device)
    figures = compare(kernel, provider, machine.device)
    operands = v3_operands(machine.device)
    seconds = machine.seconds(kernel.work(provider, operands))
    rate = kernel.amount(operands) / seconds
    unit = {"TFLOP/s": rate / 1e12} if kernel.is_product else {"GB/s": rate / 1e9}
    return {**unit, "ms": seconds * 1e3, **figures}


def need_triton(machine: Machine) -> None:
    """Raise `NotHere` if the kernels cannot run."""
    missing = list(unavailable_reasons("triton", on_gpu=machine.on_gpu))
    if missing:
        raise NotHere("; ".join(missing))


def compare(kernel: Kernel, provider: PrecisionBackend, device: torch.device) -> Mapping[str, float]:
    """Compare one kernel on `device` with the reference on a CPU. Raise `Wrong` if they differ.

    Quantized numbers and scales must be the same to the last bit; where a SwiGLU's exp comes in, the same as torch's on
    `device`, and but for a few the CPU's.
    """
    operands = small_operands(faults=not kernel.is_product)
    ours = _numbers(kernel.work(provider, operands.to(device))())
    reference = _numbers(kernel.work(ReferenceBackend(), operands)())
    if kernel.is_product:
        error = float((ours[0] - reference[0]).abs().max() / reference[0].abs().max())
        return {"error": expect("the product", error, PRODUCT_ERROR)}
    exact = _numbers(kernel.work(ReferenceBackend(), operands.to(device))()) if kernel.has_exp else reference
    wrong = max(_differing(*pair) for pair in zip(ours, exact, strict=True))
    if wrong:
        raise Wrong(f"{wrong:.2%} of its values or scales differ from the reference's")
    return {"unlike_cpu": expect("the share unlike a CPU's", _differing(ours[0], reference[0]), OTHER_EXP)}


def _numbers(made: object) -> list[Tensor]:
    """Return values and scales, or a product, in FP32 on the host."""
    if isinstance(made, ColumnwiseFp8Tensor):
        made = made.tiles
    tensors = [made] if isinstance(made, Tensor) else list(vars(made).values())
    return [x.float().cpu() for x in tensors]


def _differing(ours: Tensor, theirs: Tensor) -> float:
    """Return the share of values that differ; NaN equals NaN."""
    return float(((ours != theirs) & ~(ours.isnan() & theirs.isnan())).double().mean())


def small_operands(*, faults: bool) -> Operands:
    """Return difficult inputs on the host: extreme values, an expert without rows, sides not divisible by 128."""
    rows_L, hidden, inner = (130, 0, 128, 7), 400, 192
    rows = sum(rows_L)
    generator = torch.Generator().manual_seed(0)
    x_RD = torch.randn(rows, hidden, generator=generator)
    return Operands(
        rows_L,
        (hard_numbers(rows, hidden) if faults else x_RD).bfloat16(),
        torch.randn(rows, 2 * inner, generator=generator).bfloat16(),
        torch.rand(rows, generator=generator),
        torch.randn(len(rows_L), 2 * inner, hidden, generator=generator).bfloat16(),
    )


def v3_operands(device: torch.device, rows_L: RowsPerExpert = (8192,) * 4) -> Operands:
    """Return inputs with the sizes of DeepSeek-V3's four experts per rank under 64 expert-parallel ranks."""
    hidden, inner, rows = 7168, 2048, sum(rows_L)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    gates_R = torch.rand(rows, device=device)
    return Operands(
        rows_L, normal(rows, hidden), normal(rows, 2 * inner), gates_R, normal(len(rows_L), 2 * inner, hidden)
    )


COUNTS: tuple[RowsPerExpert, ...] = (
    (128, 256, 0, 128),
    (101, 128, 260, 7),
    (2000, 130, 0, 1),
    (512, 512, 512, 512),
    (1, 0, 0, 0),
    (640, 300, 900, 77),
)
"""Rows of four experts in several micro-batches, with aligned and unaligned numbers of blocks."""


def compiled_variants(machine: Machine) -> Figures:
    """Count the variants of each kernel that Triton compiles as row counts change; each takes seconds.

    1 is what a run can have compiled before its first step.
    """
    need_triton(machine)
    from shoestring.trainer.precision import kernels  # needs triton

    for kernel in KERNELS:
        vars(kernels)[kernel.name].device_caches.clear()  # variants compiled by other rows do not count
    provider = open_backend("triton", machine.device)
    for rows_L in COUNTS:
        operands = v3_operands(machine.device, rows_L)
        for kernel in KERNELS:
            kernel.work(provider, operands)()
    machine.synchronize()
    device = machine.device.index or 0
    made = {kernel.name: vars(kernels)[kernel.name].device_caches[device][0] for kernel in KERNELS}
    counts = {name: float(len(variants)) for name, variants in made.items()}
    spills = max(variant.n_spills or 0 for variants in made.values() for variant in variants.values())
    return {"row counts": float(len(COUNTS)), **counts, "most_spills": float(spills)}


CHECKS = tuple(
    Check(f"triton {kernel.name}", partial(kernel_row, kernel.name), mandatory=True, seconds=60) for kernel in KERNELS
)
LAST_CHECKS = (Check("triton, compiled variants", compiled_variants, mandatory=False, seconds=60),)
"""Checks that run last, since they compile for a long time."""
