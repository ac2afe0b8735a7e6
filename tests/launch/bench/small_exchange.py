"""An exchange of two small nodes."""

from shoestring.launch.bench.bench_exchange_rank import ExchangeBenchmarkSpec

SPEC = ExchangeBenchmarkSpec(
    nodes=2,
    gpus_per_node=1,
    hidden=512,
    tokens=256,
    experts=8,
    top_k=4,
    groups=2,
    top_k_groups=1,
    exchanges=("flat", "two_hop"),
    formats=("bf16", "fp8"),
    repeats=1,
    overlap=False,
)
