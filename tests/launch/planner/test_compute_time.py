"""The clusters and recipes that can be priced, and the table that prices them."""

from dataclasses import replace

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.launch.compose import compose_run_config
from shoestring.launch.planner.compute_time import ComputeTimeModel
from shoestring.launch.planner.kernel_times import weakest_evidence
from shoestring.launch.planner.operations import ComputePhase, LayerWorkload
from shoestring.launch.planner.recipe import ForecastRecipe, GemmPrecision
from shoestring.tests.launch.planner.v3 import costs


def test_a_cluster_without_kernel_times_is_described_but_not_priced() -> None:
    with pytest.raises(ConfigError, match=r"cluster\.tables = None"):
        ComputeTimeModel.from_cluster(
            compose_run_config(["cluster=a100"]).cluster, ForecastRecipe(precision=GemmPrecision.BF16)
        )


def test_no_fp8_where_the_cluster_has_none() -> None:
    cluster = replace(compose_run_config(["cluster=h800"]).cluster, peak_fp8_tflops=None)
    with pytest.raises(ConfigError, match=r"precision\.linear = 'fp8': h800 has no FP8; use precision=bf16"):
        ComputeTimeModel.from_cluster(cluster, ForecastRecipe())


def test_a_table_of_another_cluster_measures_nothing_here() -> None:
    compute = ComputeTimeModel.from_cluster(compose_run_config(["cluster=h100"]).cluster, ForecastRecipe())
    model = compose_run_config(["model=deepseek_v3", "data.vocab_size=129280"]).model
    compute.phase_seconds(LayerWorkload(model, 4096, 1, 64), ComputePhase.ATTENTION_F)
    assert compute.coverage.evidence_shares() == {"assumed": 1.0}
    assert weakest_evidence("measured", "assumed", "published") == "assumed"


def test_the_head_is_all_in_the_forward() -> None:
    own = costs()
    shape, cost = own.shape, own.compute_model
    assert cost.phase_seconds(shape, ComputePhase.HEAD_F) == pytest.approx(
        3 * 2 * 4096 * 7168 * 129_280 / 662e12, rel=0.01
    )
    assert cost.phase_seconds(shape, ComputePhase.HEAD_B) == cost.phase_seconds(shape, ComputePhase.HEAD_W) == 0.0
