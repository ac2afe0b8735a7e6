"""Values that must be equal in every process of a launch, and the first key that differs."""

import re

import pytest

from shoestring.comm.rank_consistency import find_first_mismatch
from shoestring.launch.compose import compose_run_config
from shoestring.launch.run.fingerprint import code_hash, data_digest, run_fingerprint

SECRET = "hunter2"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEAM", SECRET)
    monkeypatch.setenv("BATCH", "48")


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        (["training.seed=5"], "training.seed"),
        (["optimizer.peak_learning_rate=0.5"], "optimizer.peak_learning_rate"),
        (["model.moe_intermediate_size=64"], "model.moe_intermediate_size"),
        (["data.prepared=elsewhere"], "data.prepared"),
        (["telemetry.log_every=3", "training.seed=1"], "training.seed"),
        (["data.validation=[a,b]"], "data.validation"),
    ],
)
def test_the_first_key_that_differs_is_named(changed: list[str], key: str) -> None:
    assert (
        find_first_mismatch(
            run_fingerprint(compose_run_config([]), "d"), run_fingerprint(compose_run_config(changed), "d")
        )
        == key
    )


def test_an_environment_that_differs_is_seen_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    override = ["training.run_dir=${oc.env:TEAM}"]
    here = run_fingerprint(compose_run_config(override), "d")
    monkeypatch.setenv("TEAM", "other")
    there = run_fingerprint(compose_run_config(override), "d")
    assert find_first_mismatch(here, there) == "training.run_dir"
    assert here["training.run_dir"].display_value == there["training.run_dir"].display_value == '"${oc.env:TEAM}"'


def test_other_data_code_or_torch_are_seen() -> None:
    config = compose_run_config([])
    facts = run_fingerprint(config, "one")
    assert find_first_mismatch(facts, run_fingerprint(config, "other")) == "data"
    assert {"code", "torch", "python"} <= facts.keys()
    assert re.fullmatch("[0-9a-f]{64}", code_hash())
    assert code_hash() == facts["code"].digest
    assert data_digest(compose_run_config(["data.prepared=/none"])).startswith("cannot be read here")
