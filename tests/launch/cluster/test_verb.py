"""Options of `shoestring cluster` reach the run."""

from pathlib import Path

import pytest

from shoestring.launch.cli import parse_arguments
from shoestring.launch.cluster import cluster_run
from shoestring.launch.cluster.cluster_run import SimulatedClusterRun


def test_options_reach_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[SimulatedClusterRun] = []

    def record(run: SimulatedClusterRun) -> int:
        runs.append(run)
        return 3

    monkeypatch.setattr(cluster_run, "run_on_simulated_cluster", record)
    size = ("--nodes", "3", "--gpus-per-node", "2", "--uplink", "200mbit", "--fresh", "--config-dir", "own")
    faults = ("--kill-node", "2@8", "--cut-link", "0@5", "--cut-link", "1@6")
    options = parse_arguments(["cluster", *size, *faults, "--", "training.seed=1"])
    assert options.run(options) == 3
    named = [("--cut-link", "0@5"), ("--cut-link", "1@6"), ("--kill-node", "2@8")]
    assert runs == [SimulatedClusterRun(["training.seed=1"], Path("own"), True, 3, 2, "200mbit", named)]
