"""Tables of kernel times: the source of a row, and the nearest one."""

from pathlib import Path

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.launch.planner.kernel_times import (
    EvidenceCoverage,
    KernelMeasurement,
    KernelTable,
    read_kernel_table,
    write_kernel_table,
)

EVIDENCE = {"measured", "published", "assumed"}


@pytest.mark.parametrize("name", ["h800", "b200"])
def test_each_row_of_a_table_has_a_source(name: str) -> None:
    rows = read_kernel_table(name).rows
    assert rows
    assert all(row.evidence in EVIDENCE and row.source for row in rows)


def row(name: str, value: float, tokens: int = 4096, inputs: int = 1024) -> KernelMeasurement:
    return KernelMeasurement("gemm", name, "forward", "bf16", tokens, inputs, 2048, value, "us", "measured", "a test")


def test_a_hit_is_the_same_matrix_with_about_as_many_tokens() -> None:
    table = KernelTable("t", (row("small", 10.0, inputs=512), row("large", 20.0)))
    for tokens, is_hit in ((4096, True), (8192, True), (8200, False), (2048, True), (2000, False)):
        found = table.nearest_row("gemm", "forward", "bf16", (tokens, 1024, 2048))
        assert found is not None
        assert (found[0].name, found[1]) == ("large", is_hit)
    found = table.nearest_row("gemm", "forward", "bf16", (4096, 700, 2048))
    assert found is not None
    assert (found[0].name, found[1]) == ("small", False)
    assert table.nearest_row("gemm", "forward", "fp8", (4096, 1024, 2048)) is None


def test_tables_are_written_as_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write_kernel_table(path, [row("a", 1.5), row("b", 2.5)])
    assert read_kernel_table(str(path)).rows == (row("a", 1.5), row("b", 2.5))


def test_a_table_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="must have the columns"):
        read_kernel_table(str(path))
    path.write_text(f"kind,{'9' * 200_000}\n")
    with pytest.raises(ConfigError, match=r"table.csv.*field larger than field limit"):
        read_kernel_table(str(path))
    with pytest.raises(ConfigError, match="neither a table of the planner nor a file"):
        read_kernel_table("nowhere")


def test_coverage_is_by_time() -> None:
    coverage = EvidenceCoverage()
    coverage.add_seconds("measured", 3.0)
    coverage.add_seconds("assumed", 1.0)
    assert coverage.evidence_shares() == {"assumed": 0.25, "measured": 0.75}


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ("gemm,a,forward", "it must have 11 columns"),
        ("gemm,a,forward,bf16,1,2,3,4.0,us,measured,a test,more", "it must have 11 columns"),
        ("gemm,a,forward,bf16,1,2.5,3,4.0,us,measured,a test", "invalid literal for int"),
        ("gemm,a,forward,bf16,1,2,-3,4.0,us,measured,a test", "a number that is negative or not finite"),
        ("gemm,a,forward,bf16,1,2,3,nan,us,measured,a test", "a number that is negative or not finite"),
        ("gemm,a,forward,bf16,1,2,3,0,share,measured,a test", "a rate of 0"),
        ("gemm,a,forward,bf16,1,2,3,4.0,ms,measured,a test", "units are us, GB/s"),
    ],
)
def test_a_line_that_is_no_row_is_refused(cells: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write_kernel_table(path, [row("a", 1.5)])
    path.write_text(f"{path.read_text()}{cells}\n")
    with pytest.raises(ConfigError, match=rf"table\.csv:3 = .*is not a row of the table \({reason}"):
        read_kernel_table(str(path))
