"""`shoestring bench`: benchmarks of parts of this machine."""

import argparse
from dataclasses import fields

from ..answers.blocks import Answer
from ..answers.options import add_answer_options

_NUMBERS = {
    "nodes": 2,
    "gpus-per-node": 2,
    "hidden": 1024,
    "tokens": 512,
    "experts": 64,
    "top-k": 8,
    "groups": 4,
    "top-k-groups": 2,
    "repeats": 5,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's actions with their options."""
    actions = parser.add_subparsers(dest="action", required=True)
    exchange = actions.add_parser("exchange", help="bytes and times of the token dispatchers (all-to-all)")
    for name, default in _NUMBERS.items():
        exchange.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    exchange.add_argument("--exchanges", default="flat,two_hop", help="default flat,two_hop")
    exchange.add_argument(
        "--formats", default="bf16,fp8", help="wire formats of rows sent to experts (default bf16,fp8)"
    )
    exchange.add_argument("--overlap", action="store_true", help="also measure the overlap with computing")
    text = "run on a simulated cluster with this bandwidth per node, such as 200mbit (needs root)"
    exchange.add_argument("--uplink", metavar="RATE", help=text)
    add_answer_options(exchange)
    exchange.set_defaults(answer=exchange_answer)


def exchange_answer(options: argparse.Namespace) -> Answer:
    """Run the benchmark of token dispatchers."""
    from .bench_exchange import bench_exchange, benchmark_answer, parse_name_list
    from .bench_exchange_rank import ExchangeBenchmarkSpec

    chosen = {
        field.name: getattr(options, field.name) for field in fields(ExchangeBenchmarkSpec) if field.name in options
    }
    names = {key: parse_name_list(chosen[key], f"--{key}") for key in ("exchanges", "formats")}
    return benchmark_answer(bench_exchange(ExchangeBenchmarkSpec(**(chosen | names)), options.uplink))
