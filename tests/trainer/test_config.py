"""Every invalid value is refused with its key and a hint."""

import re
from collections.abc import Iterator, Mapping

import pytest

from shoestring.launch.compose import compose_run_config, config_to_dict
from shoestring.tests.launch.refusals import by_field
from shoestring.trainer.config import RunConfig
from shoestring.trainer.structured_config import build_dataclass

YARN: dict[str, object] = {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32.0, "beta_slow": 1.0}
YARN |= {"mscale": 1.0, "mscale_all_dim": 1.0}


@pytest.fixture(scope="module")
def tree() -> dict[str, object]:
    """Return a valid run with every optional part: tiny, on one rank."""
    return changed(config_to_dict(compose_run_config([])), {"model.rope_scaling": YARN, "cluster.peak_tflops": 1.0})


def changed(tree: Mapping[str, object], values: Mapping[str, object]) -> dict[str, object]:
    """Return a copy of a nested tree with other values at some dotted keys."""
    copy = {key: changed(item, {}) if isinstance(item, Mapping) else item for key, item in tree.items()}
    for path, value in values.items():
        key, _, rest = path.partition(".")
        inner = copy[key]
        copy[key] = value if not rest or not isinstance(inner, dict) else changed(inner, {rest: value})
    return copy


OF_THREE = {"topology.gpus_per_node": 3, "training.global_batch_size": 15}
"""Hint for ep = 3: the sizes that fit."""


def problems(tree: Mapping[str, object], values: Mapping[str, object]) -> dict[str, str]:
    return by_field(build_dataclass(RunConfig, changed(tree, values)).problems())


def numbers(tree: Mapping[str, object], path: str = "") -> Iterator[str]:
    for key, item in tree.items():
        if isinstance(item, Mapping):
            yield from numbers(item, f"{path}{key}.")
        elif isinstance(item, int | float) and not isinstance(item, bool):
            yield f"{path}{key}"


def test_the_run_without_fault(tree: dict[str, object]) -> None:
    assert problems(tree, {}) == {}
    assert len(list(numbers(tree))) > 50


def test_no_number_may_be_negative(tree: dict[str, object]) -> None:
    schedules = ("training.mtp_loss_scaling_factor.0", "training.router_bias_update_rate.0")
    for path in numbers(tree):
        field = path.removesuffix(".0") if path in schedules else path
        found = problems(tree, {path: -1} if path not in schedules else {field: {0: -1.0}})
        assert field in found, path
        assert re.search(r"must be (at least|greater than)|must divide", found[field]), found


@pytest.mark.parametrize(
    "values",
    [
        {"data.vocab_size": 300},  # fewer tokens than rows
        {"data.vocab_size": None, "training.start_from": "run"},
        {"data.vocab_size": None, "data.tokenizer": "x", "data.eos_token": 3, "data.fim_rate": 1, "data.seed": 7},
        {"data.validation": [], "data.validation_fraction": 0.01, "data.token_split_rate": 1, "data.workers": 1},
    ],
    ids=lambda values: ",".join(values),
)
def test_what_is_possible(tree: dict[str, object], values: dict[str, object]) -> None:
    assert problems(tree, values) == {}


ZERO_IS_NOTHING = {
    "data.validation_fraction",
    "data.max_bad_records",
    "data.seed",
    "data.fim_rate",
    "data.token_split_rate",
    "model.first_k_dense_replace",
    "model.n_shared_experts",
    "model.num_nextn_predict_layers",
    "model.rope_scaling.mscale",
    "model.rope_scaling.mscale_all_dim",
    "optimizer.final_learning_rate",
    "optimizer.warmup_tokens",
    "optimizer.decay_tokens",
    "optimizer.beta1",
    "optimizer.beta2",
    "optimizer.weight_decay",
    "training.seed",
    "training.seq_aux_loss_coeff",
    "training.mtp_loss_scaling_factor.0",
    "training.router_bias_update_rate.0",
    "training.evaluate_every",
    "training.checkpoint_every",
    "training.sample_tokens",
    "training.rampup_tokens",
}


def test_zero_is_refused_where_it_means_nothing(tree: dict[str, object]) -> None:
    allowed = {path for path in numbers(tree) if not path.endswith(".0") and not problems(tree, {path: 0})}
    assert allowed == {path for path in ZERO_IS_NOTHING if not path.endswith(".0")}
    assert (
        problems(tree, {"training.mtp_loss_scaling_factor": {0: 0.0}, "training.router_bias_update_rate": {0: 0.0}})
        == {}
    )


@pytest.mark.parametrize(
    ("values", "field", "hint"),
    [
        (
            {"training.seed": 2**63},
            "training.seed",
            "must be at most 9,223,372,036,854,775,807, the limit of random generators",
        ),
        ({"optimizer.decay_tokens": 5}, "optimizer.decay_tokens", "has no effect while constant_tokens is null"),
        ({"model.moe_intermediate_size": 92}, "model.moe_intermediate_size", "must be a multiple of 8"),
        ({"precision.compute": "float32", "model.hidden_size": 126}, "model.hidden_size", "must be a multiple of 4"),
        ({"model.n_routed_experts": 18}, "model.n_group", "must divide n_routed_experts = 18"),
        ({"model.n_group": 3}, "model.n_group", "must divide n_routed_experts = 16"),
        (
            {"model.num_experts_per_tok": 9},
            "model.num_experts_per_tok",
            "must be at most 8: the 2 of 4 groups per token hold 8 experts",
        ),
        ({"model.topk_group": 5}, "model.topk_group", "must be at most n_group = 4"),
        ({"model.qk_rope_head_dim": 15}, "model.qk_rope_head_dim", "must be even"),
        ({"model.first_k_dense_replace": 5}, "model.first_k_dense_replace", "must be at most num_hidden_layers = 4"),
        ({"model.scoring_func": "tanh"}, "model.scoring_func", "must be sigmoid or softmax"),
        ({"model.q_lora_rank": 0}, "model.q_lora_rank", "null for no query compression"),
        ({"model.rope_scaling.factor": 0.5}, "model.rope_scaling.factor", "must be at least 1"),
        ({"model.rope_scaling.beta_fast": 1.0}, "model.rope_scaling.beta_fast", "must be greater than beta_slow = 1.0"),
        ({"topology.pp": 5}, "topology.pp", "gives 5 stages"),
        ({"exchange.name": "two_hops"}, "exchange.name", "must be flat, two_hop or deepep"),
        ({"precision.compute": "fp8"}, "precision.compute", "must be auto, float32, bfloat16 or float64"),
        ({"precision.linear": "fp9"}, "precision.linear", "must be native or fp8"),
        ({"precision.fp8_backend": "cuda"}, "precision.fp8_backend", "must be auto, triton, torch, te or reference"),
        ({"precision.fp8_scale_format": "int8"}, "precision.fp8_scale_format", "must be fp32 or power_of_two"),
        ({"precision.fp8_backend": "reference"}, "precision.fp8_backend", "set precision.linear=fp8"),
        ({"precision.fp8_scale_format": "power_of_two"}, "precision.fp8_scale_format", "set precision.linear=fp8"),
        ({"optimizer.beta2": 1.0}, "optimizer.beta2", "less than 1"),
        ({"optimizer.final_learning_rate": 1.0}, "optimizer.final_learning_rate", "at most peak_learning_rate"),
        ({"schedule.name": "sequential"}, "schedule.name", "must be gpipe, 1f1b, interleaved, "),
        ({"schedule.name": "dualpipe", "topology.pp": 3}, "topology.pp", "even"),
        ({"schedule.layers_per_stage": [4, 1]}, "schedule.layers_per_stage", "2 stages"),
        ({"data.corpus": ""}, "data.corpus", "must name a file, folder or glob"),
        ({"data.prepared": ""}, "data.prepared", "must name a directory"),
        ({"data.prepared": "/"}, "data.prepared", "must name a directory"),
        ({"data.vocab_size": 257}, "data.vocab_size", "must be at least 258: 256 bytes and two control tokens"),
        ({"data.vocab_size": 2**32 + 1}, "data.vocab_size", "32 bits"),
        ({"data.validation": []}, "data.validation", "must name at least one file, or set data.validation_fraction"),
        ({"data.validation_fraction": 0.1}, "data.validation_fraction", "must be 0 while data.validation names files"),
        ({"data.validation_fraction": 1}, "data.validation_fraction", "must be less than 1"),
        ({"data.fim_rate": 1.5}, "data.fim_rate", "must be at most 1"),
        ({"data.fim_rate": 1}, "data.fim_rate", "has no tokens for fill-in-the-middle"),
        ({"data.fim_tokens": ["a", "b", "a"]}, "data.fim_tokens", "must name three different tokens"),
        ({"data.token_split_rate": 1.01}, "data.token_split_rate", "must be at most 1"),
        ({"data.eos_token": "<x>"}, "data.eos_token", "has no effect: the tokenizer that is trained here"),
        ({"data.eos_token": "", "data.vocab_size": None, "data.tokenizer": "x"}, "data.eos_token", "or its id"),
        ({"data.eos_token": -1, "data.vocab_size": None, "data.tokenizer": "x"}, "data.eos_token", "or its id"),
        ({"data.tokenizer": "", "data.vocab_size": None}, "data.tokenizer", "must name a tokenizer.json"),
        ({"data.tokenizer": "x"}, "data.vocab_size", "set data.vocab_size=null"),
        ({"data.vocab_size": None}, "data.vocab_size", "must be given to train a tokenizer, or name one"),
        ({"data.text_key": ""}, "data.text_key", "must not be empty"),
        ({"data.validation": ["hamlet", "hamlet"]}, "data.validation", "twice"),
        ({"budget.phase": "later"}, "budget.phase", "must be pre_train, context_extension or post_training"),
        ({"training.device": "tpu"}, "training.device", "must be auto, cpu or cuda"),
        ({"training.run_dir": ""}, "training.run_dir", "must name a directory"),
        ({"training.sample_prompt": ""}, "training.sample_prompt", "set training.sample_tokens=0"),
        (
            {"training.mtp_loss_scaling_factor": {}},
            "training.mtp_loss_scaling_factor",
            "from the start of training: {0: ",
        ),
        (
            {"training.mtp_loss_scaling_factor": {1000: 0.1}},
            "training.mtp_loss_scaling_factor",
            "from the start of training: {0: ",
        ),
        (
            {"training.router_bias_update_rate": {0: 0.1, -5: 0.2}},
            "training.router_bias_update_rate",
            "must be at least 0",
        ),
        ({"telemetry.wandb.mode": "on"}, "telemetry.wandb.mode", "must be offline, online or disabled"),
        ({"telemetry.wandb.project": ""}, "telemetry.wandb.project", "must not be empty"),
        # Values that two parts of a run must agree on.
        ({"topology.ep": 3, **OF_THREE}, "topology.ep", "must divide model.n_routed_experts = 16"),
        ({"topology.ep": 3, "training.global_batch_size": 15}, "topology.ep", "must divide gpus_per_node = 8"),
        (
            {"data.vocab_size": 4096},
            "data.vocab_size",
            "must be at most model.vocab_size = 2048; ",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_what_is_impossible(tree: dict[str, object], values: dict[str, object], field: str, hint: str) -> None:
    found = problems(tree, values)
    assert list(found) == [field]
    assert hint in found[field]


@pytest.mark.parametrize(("global_batch", "nearest"), [(1, 24), (13, 24), (25, 24), (35, 24), (37, 48), (49, 48)])
def test_the_global_batch_is_a_multiple_of_what_all_ranks_take(
    tree: dict[str, object], global_batch: int, nearest: int
) -> None:
    layout = {"topology.edp": 3, "topology.ep": 4, "schedule.micro_batch_size": 2}
    found = problems(tree, {**layout, "training.global_batch_size": global_batch})
    assert found.keys() == {"training.global_batch_size"}
    assert f"must be a multiple of 24 (edp x ep x micro_batch = 3 x 4 x 2); the nearest is {nearest}" in str(found)
    assert problems(tree, {**layout, "training.global_batch_size": nearest}) == {}


def test_parts_that_do_not_agree_are_named_together(tree: dict[str, object]) -> None:
    found = problems(tree, {"topology.ep": 3, **OF_THREE, "training.global_batch_size": 16, "data.vocab_size": 4096})
    assert found.keys() == {"topology.ep", "training.global_batch_size", "data.vocab_size"}


def test_a_value_that_is_impossible_on_its_own_hides_nothing_and_judges_nothing(tree: dict[str, object]) -> None:
    wrong = {
        "topology.ep": 0,
        "model.num_experts_per_tok": 99,
        "training.device": "tpu",
        "training.global_batch_size": 7,
    }
    assert problems(tree, wrong).keys() == {"topology.ep", "model.num_experts_per_tok", "training.device"}
    assert "training.global_batch_size" in problems(tree, {**wrong, "topology.ep": 2})
    assert problems(
        tree, {"model.n_routed_experts": 0, "model.topk_group": 9, "model.first_k_dense_replace": 9}
    ).keys() == {
        "model.n_routed_experts",
        "model.topk_group",
        "model.first_k_dense_replace",
    }
    assert problems(tree, {"model.n_group": 3, "model.num_experts_per_tok": 17}).keys() == {
        "model.n_group",
        "model.num_experts_per_tok",
    }
    assert problems(
        tree, {"data.vocab_size": 5, "model.moe_intermediate_size": 92, "precision.compute": "fp8"}
    ).keys() == {
        "data.vocab_size",
        "precision.compute",
    }
