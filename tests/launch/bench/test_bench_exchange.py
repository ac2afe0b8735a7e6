"""`shoestring bench exchange`: refusals, and figures that agree with each other and with the bytes sent."""

from dataclasses import replace

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.launch.bench.bench_exchange import bench_exchange, parse_name_list
from shoestring.tests.launch.bench.small_exchange import SPEC


@pytest.mark.parametrize(
    ("changes", "field", "gist"),
    [
        ({"nodes": 0}, "nodes", "at least 1"),
        ({"experts": 9}, "experts", "multiple of the 2 ranks"),
        ({"groups": 8, "top_k_groups": 9}, "top_k_groups", "at most groups = 8"),
        ({"top_k": 5}, "top_k", "at most 4"),
        ({"exchanges": ("round",)}, "exchanges", "flat, two_hop, deepep"),
        ({"exchanges": ("deepep",)}, "exchanges", "Hopper"),
        ({"formats": ("fp4",)}, "formats", "bf16, fp8"),
    ],
)
def test_refusals(changes: dict[str, object], field: str, gist: str) -> None:
    with pytest.raises(ConfigError) as refused:
        bench_exchange(replace(SPEC, **changes), None)  # type: ignore[arg-type]
    assert any(problem.field == field and gist in problem.hint for problem in refused.value.problems)


@pytest.mark.parametrize("text", ["", "flat,", "flat,flat"])
def test_names_are_read(text: str) -> None:
    assert parse_name_list("flat, two_hop", "--exchanges") == ("flat", "two_hop")
    with pytest.raises(ConfigError):
        parse_name_list(text, "--exchanges")
