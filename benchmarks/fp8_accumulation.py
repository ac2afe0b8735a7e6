"""Error of Hopper's short accumulator in an FP8 GEMM, with and without promotion every 128 elements (report §3.3.2).

    python benchmarks/fp8_accumulation.py [--json PATH]

Model (trainer/precision/reference.py): an instruction adds 32 products to its accumulator, all aligned to the largest
among them and to the accumulator, with 13 fraction bits kept. Inputs are uniform on [0, 1) and rounded to E4M3. The
error is max |error| / max |exact sum| over the result; the report gives "nearly 2%" at K = 4096 for two random
matrices.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from shoestring.trainer.precision.reference import emulate_hopper_gemm, exact_gemm

SIDE, LENGTHS, PROMOTIONS = 64, (512, 1024, 2048, 4096), (None, 512, 128)
REPORTED = 0.02


def uniform(rows: int, length: int, generator: torch.Generator) -> Tensor:
    return torch.rand(rows, length, generator=generator).to(torch.float8_e4m3fn).double()


def relative_error(length: int, promote_every: int | None) -> float:
    generator = torch.Generator().manual_seed(0)
    a_XK, b_YK = (uniform(SIDE, length, generator) for _ in range(2))
    exact_XY = a_XK @ b_YK.T
    found_XY = emulate_hopper_gemm(a_XK, b_YK, promote_every).double()
    return float((found_XY - exact_XY).abs().max() / exact_XY.abs().max())


def fp32_error(length: int) -> float:
    """Return the error of the exact sum rounded once."""
    generator = torch.Generator().manual_seed(0)
    a_XK, b_YK = (uniform(SIDE, length, generator) for _ in range(2))
    exact_XY = a_XK @ b_YK.T
    return float((exact_gemm(a_XK, b_YK).double() - exact_XY).abs().max() / exact_XY.abs().max())


def main() -> None:
    """Print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    print(f"{'K':>6} {'never promoted':>15} {'every 512':>10} {'every 128':>10} {'rounded once':>13}")
    for length in LENGTHS:
        never, seldom, often = (relative_error(length, every) for every in PROMOTIONS)
        rows.append({"K": length, "never": never, "every_512": seldom, "every_128": often, "fp32": fp32_error(length)})
        print(f"{length:6} {never:15.3%} {seldom:10.4%} {often:10.4%} {rows[-1]['fp32']:13.1e}")
    last = rows[-1]
    ratio = last["never"] / last["every_128"]
    print(f"K = 4096: {ratio:.0f} times smaller with promotion every 128; the report: nearly {REPORTED:.0%} without")
    if options.json:
        options.json.write_text(json.dumps({"side": SIDE, "reported_at_4096": REPORTED, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
