"""FP8 products at DeepSeek-V3's shapes on a Hopper GPU: our Triton kernels, torch's scaled_mm, cuBLAS BF16, DeepSeek's.

    python benchmarks/fp8_kernels.py [--json benchmarks/results/fp8_kernels_h200.json]

DeepSeek's figures are those of its public training trace (deepseek-ai/profile-data, train.json): one H800 of 132
processors, of which the products had 112; here all processors work. So a figure is matched where ours, times 112 over
the processors here, is as large. Every product is first compared with the reference provider's. Without such a GPU this
says so and ends well. Not yet run on hardware.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from shoestring.trainer.precision.provider import Provider, missing_for, open_provider
from shoestring.trainer.precision.reference import Reference
from shoestring.trainer.precision.tiles import Scales

PEAK = 1979.0  # dense FP8 TFLOP/s of an H800, H100 or H200: twice the BF16 rate of 989.5
TRACE_PROCESSORS = 112
LOCAL_EXPERTS = 4


@dataclass(frozen=True)
class Shape:
    """x [M, K] by a weight [N, K]; of a weight gradient, both [., K] with K tokens."""

    name: str
    m: int
    k: int
    n: int
    trace_tflops: float
    experts: int = 1


# The trace's products, each once; a weight gradient's name ends with wgrad.
SHAPES = (
    Shape("q_down fwd", 4096, 7168, 1536, 871),
    Shape("kv_down fwd", 4096, 7168, 576, 635),
    Shape("q_up fwd", 4096, 1536, 24576, 832),
    Shape("kv_up fwd", 4096, 512, 32768, 563),
    Shape("o_proj fwd", 4096, 16384, 7168, 1068),
    Shape("shared gate_up fwd", 4096, 7168, 4096, 929),
    Shape("shared down fwd", 4096, 2048, 7168, 871),
    Shape("experts gate_up fwd", 32768, 7168, 4096, 1033, LOCAL_EXPERTS),
    Shape("experts down fwd", 32768, 2048, 7168, 929, LOCAL_EXPERTS),
    Shape("o_proj dgrad", 4096, 7168, 16384, 1038),
    Shape("q_up dgrad", 4096, 24576, 1536, 931),
    Shape("kv_up dgrad", 4096, 32768, 512, 625),
    Shape("kv_down dgrad", 4096, 576, 7168, 522),
    Shape("q_down dgrad", 4096, 1536, 7168, 813),
    Shape("shared down dgrad", 4096, 7168, 2048, 953),
    Shape("shared gate_up dgrad", 4096, 4096, 7168, 1000),
    Shape("experts down dgrad", 32768, 7168, 2048, 1113, LOCAL_EXPERTS),
    Shape("experts gate_up dgrad", 32768, 4096, 7168, 977, LOCAL_EXPERTS),
    Shape("o_proj wgrad", 16384, 4096, 7168, 642),
    Shape("q_up wgrad", 1536, 4096, 24576, 669),
    Shape("kv_up wgrad", 512, 4096, 32768, 620),
    Shape("kv_down wgrad", 7168, 4096, 576, 485),
    Shape("q_down wgrad", 7168, 4096, 1536, 662),
)


@dataclass(frozen=True)
class Row:
    """TFLOP/s of each; None where it does not serve here."""

    shape: str
    trace: float
    triton: float | None
    torch: float | None
    bf16: float
    error: float
    """Largest, relative to the largest of the reference's."""


def work_of(shape: Shape, provider: Provider) -> Callable[[], Tensor]:
    """One product on quantised operands."""
    rows_L = (shape.m // shape.experts,) * shape.experts
    a_MK = torch.randn(shape.m, shape.k, device="cuda", dtype=torch.bfloat16)
    if shape.name.endswith("wgrad"):
        b_NK = torch.randn(shape.n, shape.k, device="cuda", dtype=torch.bfloat16)
        a, b = (provider.columns(x.T.contiguous(), (shape.k,), Scales.FP32) for x in (a_MK, b_NK))
        return lambda: provider.outer(a, b)
    weight = torch.randn(shape.experts, shape.n, shape.k, device="cuda", dtype=torch.bfloat16)
    x, blocks = provider.tiles(a_MK, Scales.FP32), provider.blocks(weight, Scales.FP32)
    return lambda: provider.multiply_grouped(x, blocks, rows_L, torch.bfloat16)


def tflops(shape: Shape, work: Callable[[], Tensor]) -> float:
    """Median of twenty, after three."""
    times = []
    for repetition in range(23):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        if repetition >= 3:
            times.append(begin.elapsed_time(end))
    milliseconds: float = statistics.median(times)
    return 2 * shape.m * shape.k * shape.n / milliseconds / 1e9


def measure(shape: Shape, providers: dict[str, Provider]) -> Row:
    rates: dict[str, float] = {}
    error = 0.0
    for name, provider in providers.items():
        torch.manual_seed(0)
        work = work_of(shape, provider)
        found = work()
        torch.manual_seed(0)
        truth = work_of(shape, Reference())()
        error = max(error, float((found - truth).abs().max() / truth.abs().max()))
        rates[name] = tflops(shape, work)
    a_MK = torch.randn(shape.m, shape.k, device="cuda", dtype=torch.bfloat16)
    b_NK = torch.randn(shape.n, shape.k, device="cuda", dtype=torch.bfloat16)
    bf16 = tflops(shape, lambda: a_MK @ b_NK.T)
    return Row(shape.name, shape.trace_tflops, rates.get("triton"), rates.get("torch"), bf16, error)


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    missing = {name: list(missing_for(name, on_gpu=torch.cuda.is_available())) for name in ("triton", "torch")}
    for name, reasons in missing.items():
        for reason in reasons:
            print(f"{name}: {reason}")
    device = torch.device("cuda")
    providers = {name: open_provider(name, device) for name, reasons in missing.items() if not reasons}
    if not providers:
        print("nothing to measure here")
        return
    facts = torch.cuda.get_device_properties(device)
    print(f"{facts.name}, {facts.multi_processor_count} processors; TFLOP/s, and the share of {PEAK:.0f}")
    rows = []
    for shape in SHAPES:
        row = measure(shape, providers)
        rows.append(row)
        best = max(rate for rate in (row.triton, row.torch) if rate is not None)
        matched = best * TRACE_PROCESSORS / facts.multi_processor_count >= row.trace
        rates = [f"{name} {rate:6.0f}" for name, rate in (("triton", row.triton), ("torch", row.torch)) if rate]
        verdict = "matched" if matched else "below"
        print(
            f"{row.shape:22} trace {row.trace:5.0f}  {'  '.join(rates)}  {best / PEAK:4.0%}  bf16 {row.bf16:5.0f}  "
            f"error {row.error:.1e}  {verdict}"
        )
    if options.json:
        document = {"device": facts.name, "torch": torch.__version__, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
