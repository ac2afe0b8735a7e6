"""The log of a rank that ends with an error."""

from pathlib import Path

from shoestring.tests.launch.rehearsal.rehearsed_rank import BF16, BF16_RANK, rehearse


def test_an_error_ends_the_step_and_the_log_is_written(shim: Path, tmp_path: Path) -> None:
    log = rehearse(shim, tmp_path, BF16, BF16_RANK, faults="shape")
    (finding,) = log.findings
    assert finding.kind == "error"
    assert "shape '[7, -1]' is invalid" in finding.text
    assert finding.code_location.startswith("building: ")  # before the step each chunk runs once, alone
    assert "trainer/model/moe_phases.py:" in finding.code_location
    assert log.events
    assert log.launches
