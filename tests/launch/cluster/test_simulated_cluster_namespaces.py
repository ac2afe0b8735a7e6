"""A machine that cannot simulate others."""

import os
from pathlib import Path

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.launch.cluster.simulated_cluster import SimulatedCluster
from shoestring.tests.launch.machines import descendants, needs_machines


@needs_machines
def test_a_machine_without_the_means_is_refused_and_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "tc"
    broken.write_text("#!/bin/sh\necho tbf is unknown >&2\nexit 2\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    before = descendants(os.getpid())
    with pytest.raises(ConfigError, match="tbf is unknown"), SimulatedCluster(nodes=2, uplink="1gbit"):
        pass
    assert descendants(os.getpid()) <= before
