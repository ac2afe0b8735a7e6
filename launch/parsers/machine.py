"""This machine: what it has, `doctor`, and how fast it is, `bench`."""

from __future__ import annotations

import argparse
from dataclasses import fields

from .options import Verbs, add_actions, add_format, show


def add(verbs: Verbs) -> None:
    """Add this family's verbs."""
    _add_doctor(verbs)
    _add_bench(verbs)


def _add_doctor(verbs: Verbs) -> None:
    doctor = verbs.add_parser("doctor", help="what serves each operation on this machine, and what cannot")
    add_format(doctor)
    doctor.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    from ..verbs.doctor import doctor_table, doctor_tree

    show(options, doctor_table, doctor_tree)
    return 0


def _add_bench(verbs: Verbs) -> None:
    benches = add_actions(verbs.add_parser("bench", help="measure a part of this machine"))
    exchange = benches.add_parser("exchange", help="bytes and times of the token exchanges")
    numbers = {"nodes": 2, "gpus-per-node": 2, "hidden": 1024, "tokens": 512, "experts": 64, "top-k": 8}
    numbers |= {"groups": 4, "top-k-groups": 2, "repeats": 5}
    for name, default in numbers.items():
        exchange.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    exchange.add_argument("--exchanges", default="flat,two_hop", help="default flat,two_hop")
    exchange.add_argument("--formats", default="bf16,fp8", help="of rows on their way to experts (default bf16,fp8)")
    exchange.add_argument("--overlap", action="store_true", help="measure also how exchanges hide behind computing")
    text = "on a simulated cluster with such uplinks, as 200mbit (root)"
    exchange.add_argument("--uplink", metavar="RATE", help=text)
    add_format(exchange)
    exchange.set_defaults(run=_bench_exchange)


def _bench_exchange(options: argparse.Namespace) -> int:
    from ..bench.bench_exchange import bench_exchange, bench_tables, read_names
    from ..bench.bench_exchange_rank import ExchangeSpec

    chosen = {field.name: getattr(options, field.name) for field in fields(ExchangeSpec) if field.name in options}
    names = {key: read_names(chosen[key], f"--{key}") for key in ("exchanges", "formats")}
    result = bench_exchange(ExchangeSpec(**(chosen | names)), options.uplink)
    show(options, lambda: bench_tables(result), lambda: result)
    return 0
