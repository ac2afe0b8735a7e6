"""FP8 GEMMs at DeepSeek-V3's shapes on a Hopper GPU: our Triton kernels, torch's scaled_mm, cuBLAS BF16, DeepSeek's.

    python benchmarks/fp8_kernels.py [--json benchmarks/results/fp8_kernels_h200.json]

DeepSeek's figures come from its public training trace (deepseek-ai/profile-data, train.json): one H800 with 132 SMs,
of which the GEMMs had 112; here all SMs compute. So the target is a figure times the SMs here over 112, and for a
weight gradient 0.9 of that. Times are GPU times: launches are queued while the GPU sleeps, and operands are not in its
cache. Every product is first compared with the reference backend's, and a wrong one fails the script. Without such a
GPU it prints why and exits with 0. Not yet run on hardware.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from shoestring.trainer.precision.backend import PrecisionBackend, open_backend, unavailable_reasons
from shoestring.trainer.precision.fp8_tensors import ScaleFormat
from shoestring.trainer.precision.reference import ReferenceBackend

PEAK = 1979.0  # dense FP8 TFLOP/s of an H800, H100 or H200: twice the BF16 rate of 989.5
TRACE_PROCESSORS = 112
LOCAL_EXPERTS = 4
WGRAD_SHARE = 0.9  # target for weight gradients, relative to DeepSeek's figure
ALLOWED = (
    2**-7
)  # relative to the largest value: two units in BF16's last place, far above the error of Hopper's accumulator
REPETITIONS, WARM_UP = 20, 3
CACHE = 2**28  # bytes, several times the cache of an H100 or H200


@dataclass(frozen=True)
class Shape:
    """Shape of x [M, K] by a weight [N, K]; for a weight gradient both are [., K] with K tokens."""

    name: str
    m: int
    k: int
    n: int
    trace_tflops: float
    experts: int = 1

    @property
    def is_of_weights(self) -> bool:
        return self.name.endswith("wgrad")

    def asked(self, processors: int) -> float:
        """Return the target TFLOP/s of our kernels on a GPU with `processors` SMs."""
        return self.trace_tflops * processors / TRACE_PROCESSORS * (WGRAD_SHARE if self.is_of_weights else 1)


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
    """TFLOP/s of each implementation; None if it does not run here."""

    shape: str
    trace: float
    triton: float | None
    torch: float | None
    bf16: float
    error: float
    """Largest error of either, relative to the largest value of the reference."""
    asked: float
    """Target of Triton."""


def work_of(shape: Shape, provider: PrecisionBackend) -> Callable[[], Tensor]:
    """Return a function that multiplies quantized operands; a weight gradient is added to a buffer of zeros."""
    rows_L = (shape.m // shape.experts,) * shape.experts
    a_MK = torch.randn(shape.m, shape.k, device="cuda", dtype=torch.bfloat16)
    if shape.is_of_weights:
        b_NK = torch.randn(shape.n, shape.k, device="cuda", dtype=torch.bfloat16)
        a, b = (provider.quantize_columnwise(x.T.contiguous(), (shape.k,), ScaleFormat.FP32) for x in (a_MK, b_NK))
        sum_LNK = torch.zeros(1, shape.m, shape.n, device="cuda")

        def add() -> Tensor:
            provider.accumulate_grouped_wgrad(a, b, sum_LNK)
            return sum_LNK

        return add
    weight = torch.randn(shape.experts, shape.n, shape.k, device="cuda", dtype=torch.bfloat16)
    x, blocks = provider.quantize_rowwise(a_MK, ScaleFormat.FP32), provider.quantize_weight(weight, ScaleFormat.FP32)
    return lambda: provider.grouped_gemm(x, blocks, rows_L, torch.bfloat16)


def tflops(shape: Shape, work: Callable[[], Tensor]) -> float:
    """Return the TFLOP/s of the median time."""
    return 2 * shape.m * shape.k * shape.n / statistics.median(milliseconds(work)) / 1e9


def milliseconds(work: Callable[[], Tensor]) -> list[float]:
    """Return the GPU seconds of each repetition. The GPU sleeps until all are queued, so that it never waits."""
    over_cache, cycles = torch.empty(CACHE, dtype=torch.uint8, device="cuda"), 2**26  # about 30 ms
    while True:
        spans = []
        torch.cuda.synchronize()
        torch.cuda._sleep(cycles)
        for _ in range(WARM_UP + REPETITIONS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            over_cache.zero_()
            begin.record()
            work()
            end.record()
            spans.append((begin, end))
        in_time = not spans[0][0].query()
        torch.cuda.synchronize()
        if in_time:
            return [begin.elapsed_time(end) for begin, end in spans[WARM_UP:]]
        cycles *= 2


def measure(shape: Shape, providers: dict[str, PrecisionBackend], processors: int) -> Row:
    rates: dict[str, float] = {}
    error = 0.0
    torch.manual_seed(0)
    truth = work_of(shape, ReferenceBackend())()
    for name, provider in providers.items():
        torch.manual_seed(0)
        work = work_of(shape, provider)
        error = max(error, float((work() - truth).abs().max() / truth.abs().max()))
        rates[name] = tflops(shape, work)
    a_MK = torch.randn(shape.m, shape.k, device="cuda", dtype=torch.bfloat16)
    b_NK = torch.randn(shape.n, shape.k, device="cuda", dtype=torch.bfloat16)
    bf16 = tflops(shape, lambda: a_MK @ b_NK.T)
    asked = shape.asked(processors)
    return Row(shape.name, shape.trace_tflops, rates.get("triton"), rates.get("torch"), bf16, error, asked)


def outcomes(row: Row) -> list[str]:
    """Return whether our kernels reach the target, and whether the product is right."""
    reached = [] if row.triton is None else ["reached" if row.triton >= row.asked else "BELOW"]
    return [*reached, *([] if row.error <= ALLOWED else ["WRONG"])]  # NaN is wrong too


def line(row: Row) -> str:
    rates = [f"{name} {rate:6.0f}" for name, rate in (("triton", row.triton), ("torch", row.torch)) if rate is not None]
    share = "" if row.triton is None else f"{row.triton / PEAK:4.0%}  "
    return (
        f"{row.shape:22} trace {row.trace:5.0f}  target {row.asked:5.0f}  {'  '.join(rates)}  {share}"
        f"bf16 {row.bf16:5.0f}  error {row.error:.1e}  {', '.join(outcomes(row))}"
    )


def main() -> None:
    """Measure, print a table, write JSON; fail if a product is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    missing = {name: list(unavailable_reasons(name, on_gpu=torch.cuda.is_available())) for name in ("triton", "torch")}
    for name, reasons in missing.items():
        for reason in reasons:
            print(f"{name}: {reason}")
    device = torch.device("cuda")
    providers = {name: open_backend(name, device) for name, reasons in missing.items() if not reasons}
    if not providers:
        print("nothing to measure here")
        return
    facts = torch.cuda.get_device_properties(device)
    print(f"{facts.name}, {facts.multi_processor_count} SMs; TFLOP/s, and triton's share of {PEAK:.0f}")
    rows = []
    for shape in SHAPES:
        rows.append(measure(shape, providers, facts.multi_processor_count))
        print(line(rows[-1]), flush=True)
    every = [outcomes(row) for row in rows]
    print(f"triton reaches the target at {sum('reached' in each for each in every)} of {len(rows)} shapes")
    if options.json:
        document = {"device": facts.name, "torch": torch.__version__, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    if any("WRONG" in each for each in every):
        sys.exit(f"a product differs from the reference backend's by more than {ALLOWED:.1e} of the largest value")


if __name__ == "__main__":
    main()
