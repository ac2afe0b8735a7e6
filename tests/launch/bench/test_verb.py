"""Options of `shoestring bench` reach the benchmark, and its result is printed."""

from typing import Any

import pytest

from shoestring.launch.bench import bench_exchange as benchmark
from shoestring.launch.bench.bench_exchange_rank import OPERATIONS, ExchangeBenchmarkSpec
from shoestring.tests.launch.command_line import answer, tree_of


def result_of(spec: ExchangeBenchmarkSpec, uplink: str | None) -> dict[str, Any]:
    """Return what one rank of one node would measure."""
    links = {"loopback": 1_000_000, "nvlink": 0, "infiniband": 0}
    moved = {"payload": links, "metadata": dict.fromkeys(links, 0)}
    row = {
        "exchange": spec.exchanges[0],
        "format": spec.formats[0],
        "bytes": dict.fromkeys((*OPERATIONS, "sizes"), moved),
        "seconds": dict.fromkeys(OPERATIONS, 0.25),
        "overlap": {"exchange_seconds": 0.5, "compute_seconds": 1.0, "overlapped_seconds": 1.1},
    }
    bounds = dict.fromkeys(("once_per_node", "once_per_rank", "once_per_expert"), 0)
    return {
        "spec": vars(spec),
        "device": "cpu",
        "rows": [row],
        "minimum_inter_node_bytes": {spec.formats[0]: bounds},
        "inter_node_bytes_on_interfaces": None,
        "uplink": uplink,
    }


def test_options_and_figures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(benchmark, "bench_exchange", result_of)
    asked = ("bench", "exchange", "--nodes", 1, "--top-k-groups", 1, "--exchanges", "flat", "--overlap")
    tree = tree_of(capsys, *asked, "--uplink", "1gbit")
    assert tree["uplink"] == "1gbit"
    assert {key: tree["spec"][key] for key in ("nodes", "top_k_groups", "exchanges", "formats", "tokens")} == {
        "nodes": 1,
        "top_k_groups": 1,
        "exchanges": ["flat"],
        "formats": ["bf16", "fp8"],
        "tokens": 512,
    }
    (row,) = tree["rows"]
    assert row["figures"]["loopback_bytes"] == 1_000_000 * len(OPERATIONS)
    assert row["figures"]["overlapped_over_longer"] == 1.1
    assert row["figures"]["sent_over_minimum"] is None  # one node sends nothing to others
    text = answer(capsys, *asked)
    for words in ("flat bf16", "1000.0", "1.10", "512 BF16 tokens of 1,024 per rank"):
        assert words in text


def test_names_that_are_repeated_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    refusal = answer(capsys, "bench", "exchange", "--exchanges", "flat,flat", code=2)
    assert "--exchanges = 'flat,flat': must be names separated by commas, each once" in refusal
