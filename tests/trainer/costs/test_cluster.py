"""Descriptions of clusters: every figure has a source that says what kind of evidence it is."""

from dataclasses import fields

import pytest

from shoestring.launch.compose import compose_run_config
from shoestring.trainer.costs.cluster import ClusterConfig

GPU_CLUSTERS = ("h800", "h100", "h200", "b200", "a100")
EVIDENCE = {"measured", "published", "assumed"}


@pytest.mark.parametrize("name", GPU_CLUSTERS)
def test_each_figure_has_a_source(name: str) -> None:
    cluster = compose_run_config([f"cluster={name}"]).cluster
    given = {field.name for field in fields(ClusterConfig) if cluster.__dict__[field.name] is not None}
    figures = given - {"name", "sources"}
    assert set(cluster.sources) == figures
    assert {text.partition(":")[0] for text in cluster.sources.values()} <= EVIDENCE
