"""Findings name their place in the code."""

from pathlib import Path

from shoestring.launch.rehearsal.log import HostWait
from shoestring.tests.launch.rehearsal.rehearsed_rank import BF16, BF16_RANK, rehearse


def test_faults_are_named_with_their_place(shim: Path, tmp_path: Path) -> None:
    log = rehearse(shim, tmp_path, BF16, BF16_RANK, faults="host tensor,host read,deprecated")
    found = {finding.kind: finding for finding in reversed(log.findings)}
    assert set(found) == {"device", "host read", "deprecated"}
    assert "bfloat16 host tensor [128]" in found["device"].text
    assert found["host read"].code_location.startswith("FB ")
    assert "merging is deprecated" in found["deprecated"].text
    assert all("trainer/model/moe_phases.py:" in finding.code_location for finding in log.findings)
    assert any(wait.reason == "read" and wait.is_inside_fb for wait in log.events if isinstance(wait, HostWait))
