"""The flat and the two-hop token dispatcher on simulated clusters: bytes, times, and overlap with computation.

    python benchmarks/exchange.py [--json FILE]      needs root; see `shoestring bench exchange --help` for other sizes

Four nodes of two ranks with routing as in the report (top 8 within two of four groups, one group per node), then two
nodes of one rank with more tokens, where each rank has one core and computes while its dispatches are in flight.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch

from shoestring.launch.answers.terminal import terminal_text
from shoestring.launch.bench.bench_exchange import bench_exchange, benchmark_answer
from shoestring.launch.bench.bench_exchange_rank import ExchangeBenchmarkSpec

UPLINK = "200mbit"


def spec(nodes: int, gpus_per_node: int, tokens: int, *, overlap: bool) -> ExchangeBenchmarkSpec:
    return ExchangeBenchmarkSpec(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        hidden=1024,
        tokens=tokens,
        experts=64,
        top_k=8,
        groups=4,
        top_k_groups=2,
        exchanges=("flat", "two_hop"),
        formats=("bf16", "fp8"),
        repeats=5,
        overlap=overlap,
    )


def target_ratios(wide: dict[str, Any], narrow: dict[str, Any]) -> dict[str, float]:
    """Return the ratios that have a target."""
    rows = {(row["exchange"], row["format"]): row for row in wide["rows"]}

    def payload(exchange: str, form: str) -> int:
        return int(rows[exchange, form]["bytes"]["dispatch"]["payload"]["infiniband"])

    def seconds(exchange: str, form: str) -> float:
        return float(sum(rows[exchange, form]["seconds"].values()))

    two_hop, flat = payload("two_hop", "bf16"), payload("flat", "bf16")
    overlaps = [row["overlap"] for row in narrow["rows"]]
    return {
        "payload between nodes, two_hop / flat (at most 0.30)": two_hop / flat,
        "payload between nodes, two_hop / a row a rank (less than 0.60)": two_hop
        / wide["minimum_inter_node_bytes"]["bf16"]["once_per_rank"],
        "payload between nodes, two_hop / least (1)": two_hop
        / wide["minimum_inter_node_bytes"]["bf16"]["once_per_node"],
        "dispatch payload, fp8 / bf16 (at most 0.53)": payload("two_hop", "fp8") / two_hop,
        "time, flat / two_hop, bf16 (at least 2)": seconds("flat", "bf16") / seconds("two_hop", "bf16"),
        "on the wires / counted (within 10 %)": wide["inter_node_bytes_on_interfaces"]
        / wide["inter_node_bytes_counted"],
        "computing and exchanging / longer alone, worst (at most 1.25)": max(
            o["overlapped_seconds"] / max(o["exchange_seconds"], o["compute_seconds"]) for o in overlaps
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    output = parser.parse_args().json
    wide = bench_exchange(spec(4, 2, 512, overlap=False), UPLINK)
    print(terminal_text(benchmark_answer(wide), width=120))
    narrow = bench_exchange(spec(2, 1, 2048, overlap=True), UPLINK)
    print(terminal_text(benchmark_answer(narrow), width=120))
    found = target_ratios(wide, narrow)
    for name, ratio in found.items():
        print(f"{name}: {ratio:.3f}")
    if output is not None:
        machine = {"cores": os.cpu_count(), "torch": torch.__version__, "load": os.getloadavg()[0]}
        output.write_text(
            json.dumps({"machine": machine, "target_ratios": found, "wide": wide, "narrow": narrow}, indent=1)
        )


if __name__ == "__main__":
    main()
