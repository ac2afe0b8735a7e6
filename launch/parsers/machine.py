"""Verbs about this machine: `doctor` and `bench`."""

from __future__ import annotations

import argparse
from dataclasses import fields

from .options import Subparsers, add_format_option, add_subcommands, print_result


def add_commands(verbs: Subparsers) -> None:
    """Add this family's verbs."""
    _add_doctor(verbs)
    _add_bench(verbs)


def _add_doctor(verbs: Subparsers) -> None:
    doctor = verbs.add_parser("doctor", help="which implementation runs each operation on this machine")
    add_format_option(doctor)
    doctor.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    from ..verbs.doctor import doctor_as_dict, doctor_table

    print_result(options, doctor_table, doctor_as_dict)
    return 0


def _add_bench(verbs: Subparsers) -> None:
    benches = add_subcommands(verbs.add_parser("bench", help="benchmark a part of this machine"))
    exchange = benches.add_parser("exchange", help="bytes and times of the token dispatchers (all-to-all)")
    numbers = {"nodes": 2, "gpus-per-node": 2, "hidden": 1024, "tokens": 512, "experts": 64, "top-k": 8}
    numbers |= {"groups": 4, "top-k-groups": 2, "repeats": 5}
    for name, default in numbers.items():
        exchange.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    exchange.add_argument("--exchanges", default="flat,two_hop", help="default flat,two_hop")
    exchange.add_argument(
        "--formats", default="bf16,fp8", help="wire formats of rows sent to experts (default bf16,fp8)"
    )
    exchange.add_argument("--overlap", action="store_true", help="also measure the overlap with computing")
    text = "run on a simulated cluster with this bandwidth per node, such as 200mbit (needs root)"
    exchange.add_argument("--uplink", metavar="RATE", help=text)
    add_format_option(exchange)
    exchange.set_defaults(run=_bench_exchange)


def _bench_exchange(options: argparse.Namespace) -> int:
    from ..bench.bench_exchange import bench_exchange, benchmark_tables, parse_name_list
    from ..bench.bench_exchange_rank import ExchangeBenchmarkSpec

    chosen = {
        field.name: getattr(options, field.name) for field in fields(ExchangeBenchmarkSpec) if field.name in options
    }
    names = {key: parse_name_list(chosen[key], f"--{key}") for key in ("exchanges", "formats")}
    result = bench_exchange(ExchangeBenchmarkSpec(**(chosen | names)), options.uplink)
    print_result(options, lambda: benchmark_tables(result), lambda: result)
    return 0
