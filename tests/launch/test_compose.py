"""Groups, overrides and user directories compose to one configuration, or to one list of its problems."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from shoestring.launch.compose import compose_run_config, config_to_dict, config_to_yaml, read_config
from shoestring.tests.launch.refusals import refused
from shoestring.tests.launch.small_checkpoint import SHAPE
from shoestring.tests.trainer.checkpoint.saved import save_model
from shoestring.tests.trainer.data.deepseek_tokenizer import deepseek_tokenizer_folder
from shoestring.tests.tree import ROOT
from shoestring.trainer.config import RunConfig
from shoestring.trainer.huggingface.config import parse_config_json
from shoestring.trainer.model.config import YarnConfig
from shoestring.trainer.model.model import Model

FILES = sorted((path.parent.name, path.stem) for path in (ROOT / "conf").glob("*/*.yaml"))
PARTS = [file for file in FILES if file[0] != "experiment"]
EXPERIMENTS = [choice for group, choice in FILES if group == "experiment"]
MODELS = [choice for group, choice in FILES if group == "model"]
# A group's file alone with the default model: the values that must agree follow it.
COMPANIONS = {
    "model": "data.vocab_size=${model.vocab_size}",
    "data": "model.vocab_size=${data.vocab_size}",
    "schedule": "topology.pp=2",
}


def own_file(directory: Path, name: str, text: str) -> Path:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return directory


@pytest.mark.parametrize(("group", "choice"), PARTS, ids=["-".join(file) for file in PARTS])
def test_every_file_of_every_group_makes_a_run(group: str, choice: str) -> None:
    companion = COMPANIONS.get(group, "training.seed=0")
    part = config_to_dict(compose_run_config([f"{group}={choice}", companion]))[group]
    written = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / group / f"{choice}.yaml"))
    assert isinstance(written, dict)
    assert part == {**part, **written}


RELEASED_KEYS = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "aux_loss_alpha": 0.001,
    "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu",
    "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512,
    "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1,
    "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
    "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": True,
    "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1", "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip
"""The config.json of DeepSeek-V3 on the hub."""


def test_a_released_config_json_is_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own_file(tmp_path, "model/pasted.yaml", json.dumps({"name": "deepseek_v3", **RELEASED_KEYS}, indent=2))
    pasted = compose_run_config(["model=pasted", "data.vocab_size=129280"], tmp_path).model
    said = capsys.readouterr().err
    assert said.startswith("model: keys of config.json without effect here")
    assert all(key in said for key in ("aux_loss_alpha", "quantization_config", "torch_dtype"))
    ours = compose_run_config(["model=deepseek_v3", "data.vocab_size=129280"]).model
    assert capsys.readouterr().err == ""
    assert pasted == replace(ours, rope_scaling=YarnConfig(), initializer_range=0.02)
    assert pasted == parse_config_json(RELEASED_KEYS, "deepseek_v3")


REFUSED = {"deepseek_v3_h800_published"}
"""Experiments that exist to report why they cannot run."""
RUNS = [name for name in EXPERIMENTS if name not in REFUSED]


@pytest.mark.parametrize("experiment", RUNS)
def test_every_experiment_makes_a_run(experiment: str) -> None:
    config = compose_run_config([f"experiment={experiment}"])
    assert config.total_steps >= 1
    assert (
        config.num_micro_batches * config.topology.dp * config.schedule.micro_batch_size
        == config.training.global_batch_size
    )


@pytest.mark.parametrize("experiment", sorted(REFUSED))
def test_an_experiment_that_cannot_be_is_refused(experiment: str) -> None:
    assert set(refused(compose_run_config, [f"experiment={experiment}"])) == {"training.rampup_start_batch_size"}


def test_every_group_of_files_is_a_part_of_the_run() -> None:
    assert {group for group, _ in PARTS} <= set(RunConfig.__dataclass_fields__)


def test_a_later_override_wins_over_the_experiment_and_the_group() -> None:
    config = compose_run_config(
        ["experiment=quickstart", "topology=single", "training.tokens=5000", "model.num_hidden_layers=2"]
    )
    assert (config.topology.ep, config.training.tokens, config.model.num_hidden_layers) == (1, 5000, 2)
    assert config.training.run_dir == compose_run_config(["experiment=quickstart"]).training.run_dir


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_hydras_signs_for_adding_change_nothing(prefix: str) -> None:
    assert compose_run_config([f"{prefix}training.seed=3", f"{prefix}training.sample_prompt='a: b'"]).training.seed == 3


def test_values_of_many_kinds() -> None:
    config = compose_run_config(
        [
            "training.tokens=1e6",
            "training.mtp_loss_scaling_factor={0: 0.3, 10e12: 0.1}",
            "optimizer.weight_decay=0",
            "model.q_lora_rank=null",
            "model.rope_scaling.factor=8",
            "model.norm_topk_prob=false",
            "data.validation=[hamlet, macbeth]",
        ]
    )
    assert (config.training.tokens, type(config.training.tokens)) == (1_000_000, int)
    assert config.training.mtp_loss_scaling_factor == {0: 0.3, 10**13: 0.1}
    assert (config.optimizer.weight_decay, type(config.optimizer.weight_decay)) == (0.0, float)
    assert config.model.q_lora_rank is None
    assert config.model.rope_scaling == YarnConfig(factor=8.0)
    assert config.model.norm_topk_prob is False
    assert config.data.validation == ("hamlet", "macbeth")


@pytest.mark.parametrize(
    ("override", "field", "hint"),
    [
        ("training.seeed=1", "training.seeed", "did you mean seed?"),
        ("optimizer.learning_rate=1", "optimizer.learning_rate", "did you mean peak_learning_rate?"),
        ("modle=tiny", "modle", "did you mean model?"),
        ("telemetry.wandb.moode=online", "telemetry.wandb.moode", "did you mean mode?"),
        ("training.ramp_from=8", "training.ramp_from", "no such key; see docs/configuration.md"),
        ("training.balance_weight=0", "training.balance_weight", "no such key; see docs/configuration.md"),
        ("model.layers=3", "model.layers", "did you mean num_hidden_layers?"),
        ("model.hidden_act=gelu", "model.hidden_act", "is not implemented: only 'silu' is supported"),
        ("model.attention_dropout=0.1", "model.attention_dropout", "is not implemented: only 0 is supported"),
        ("model.attention_bias=0", "model.attention_bias", "is not implemented: only False is supported"),
        ("model.num_key_value_heads=2", "model.num_key_value_heads", "is not implemented: .* as many as query heads"),
        (
            "model.rope_scaling={type: linear}",
            "model.rope_scaling.type",
            "is not implemented: only 'yarn' is supported",
        ),
        ("topology.tensor=2", "topology.tensor", "there are: edp, ep, gpus_per_node, pp"),
        ("model.hidden_size.x=3", "model.hidden_size", "must be a whole number"),
        ("training.tokens=1.5", "training.tokens", "must be a whole number"),
        ("training.tokens=true", "training.tokens", "must be a whole number"),
        ("training.tokens=many", "training.tokens", "must be a whole number"),
        ("training.seed=null", "training.seed", "must be a whole number"),
        ("model.norm_topk_prob=1", "model.norm_topk_prob", "must be true or false"),
        ("optimizer.eps=nan", "optimizer.eps", "must be a finite number"),
        ("budget.gpu_hours=inf", "budget.gpu_hours", "must be a finite number"),
        ("precision.compute=32", "precision.compute", "must be text"),
        ("data.validation=hamlet", "data.validation", r"must be a list: \[a, b\]"),
        ("data.validation=[hamlet, 1]", r"data.validation[1]", "must be text"),
        ("training.mtp_loss_scaling_factor=0.3", "training.mtp_loss_scaling_factor", "must be a mapping"),
        ("training.mtp_loss_scaling_factor={0: a}", "training.mtp_loss_scaling_factor.0", "must be a finite number"),
        ("training=3", "training", "must be a group of keys"),
        ("model=tinny", "model", f"did you mean tiny\\? there are: {', '.join(MODELS)}"),
        ("model={hidden: 3}", "model", f"no such file; there are: {', '.join(MODELS)}"),
        ("experiment=nothing", "experiment", "no such file; .*quickstart"),
        ("hydra.run.dir=x", "hydra.run.dir", "no effect here"),
        ("hydra/launcher=basic", "hydra/launcher", "no effect here"),
    ],
)
def test_an_override_that_means_nothing_is_named_with_a_hint(override: str, field: str, hint: str) -> None:
    problems = refused(compose_run_config, [override])
    assert list(problems) == [field]
    assert_says(problems[field], hint)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("training.seed", "write key=value or group=choice"),
        ("=3", "write key=value or group=choice"),
        ("training.run_dir=a=b", "quote text with signs"),
        ("training.validation=[a", "write key=value or group=choice"),
        ("~training.seed", "a key cannot be deleted"),
        ("~optimizer", "a key cannot be deleted"),
        ("training.seed=1,2", "one value per key"),
        ("model=tiny,deepseek_v3", "one value per key"),
        ("training.run_dir=${nowhere}", "'nowhere' not found"),
        ("training.run_dir=???", "Missing mandatory value"),
        ("model@other=tiny", "override model"),
    ],
)
def test_text_that_cannot_be_read_is_shown_as_it_was_written(text: str, hint: str) -> None:
    problems = refused(compose_run_config, [text])
    assert list(problems) == ["command line"]
    assert repr(text) in problems["command line"]
    assert_says(problems["command line"], hint)


def test_a_number_of_thousands_of_digits_is_refused_with_the_others() -> None:
    problems = refused(compose_run_config, [f"training.tokens=1{'0' * 5000}", "training.sed=1"])
    assert problems.keys() == {"command line", "training.sed"}
    assert_says(problems["command line"], "contains a number with too many digits")
    assert len(problems["command line"]) < 300


def test_mistakes_of_every_kind_are_refused_together(tmp_path: Path) -> None:
    overrides = ["topology=ep5", "training.sed=1", "training.tokens=1.5", "optimizer", "~budget", "exchange.name=flat"]
    problems = refused(compose_run_config, overrides, tmp_path / "nowhere")
    assert problems.keys() == {"--config-dir", "topology", "training.sed", "training.tokens", "command line"}
    assert "'optimizer'" in problems["command line"]
    assert "'~budget'" in problems["command line"]


def test_impossible_values_of_several_parts_are_refused_together() -> None:
    overrides = [
        "model.n_group=3",
        "precision.compute=int8",
        "training.mtp_loss_scaling_factor={5: 0.1}",
        "budget.gpu_hours=0",
    ]
    problems = refused(compose_run_config, overrides)
    assert problems.keys() == {
        "model.n_group",
        "precision.compute",
        "training.mtp_loss_scaling_factor",
        "budget.gpu_hours",
    }


@pytest.mark.parametrize(
    ("overrides", "fields"),
    [
        ("model.hiden=3 topology.ep=5 training.device=tpu", {"model.hiden", "topology.ep", "training.device"}),
        (
            "model.num_experts_per_tok=99 topology.ep=3 training.global_batch_size=7",
            {"model.num_experts_per_tok", "topology.ep"},
        ),
        ("training.seed=many model.n_group=5 budget.phase=nap", {"training.seed", "model.n_group", "budget.phase"}),
        ("training.seed topology=ep5 budget.gpu_hours=0", {"command line", "topology", "budget.gpu_hours"}),
        ("telemetry.log_every=0 data.validation=hamlet", {"telemetry.log_every", "data.validation"}),
    ],
)
def test_unreadable_and_impossible_values_are_refused_together(overrides: str, fields: set[str]) -> None:
    # 5 and 3 ranks do not share the global batch either.
    shared = {"training.global_batch_size"} if "topology.ep" in fields else set()
    assert refused(compose_run_config, overrides.split()).keys() == fields | shared


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        # Of 16 experts, the default: 18 or 30 are meant.
        ("model.experst=18 topology.ep=32 training.global_batch_size=32", "model.experst"),
        ("model.n_routed_experts=30.5 topology.ep=32 training.global_batch_size=32", "model.n_routed_experts"),
        ("model.blocks=3 topology.ep=32 training.global_batch_size=32", "model.blocks"),
        # Of 16 sequences and micro-batches of one.
        ("training.global_batch_size=many topology.edp=5", "training.global_batch_size"),
        (
            "schedule.micro_batch_size=half training.global_batch_size=3 topology.ep=2 model.n_routed_experts=64",
            "schedule.micro_batch_size",
        ),
        ("training=3 topology.edp=5", "training"),
        ("optimizer.constant_tokens=long optimizer.decay_tokens=5", "optimizer.constant_tokens"),
        ("topology=two topology.edp=5", "topology"),
        ("topology topology.edp=5 training.global_batch_size=15", "command line"),
        ("experiment=mine data.vocab_size=4096 topology.ep=16", "experiment"),
        ("experiment data.vocab_size=4096 topology.ep=16", "command line"),
        ("=4 data.vocab_size=4096", "command line"),
        ("data.vocab_size=big model.vocab_size=4096", "data.vocab_size"),
        ("model=large data.vocab_size=4096", "model"),
    ],
)
def test_a_default_in_place_of_an_unreadable_value_causes_no_other_error(overrides: str, field: str) -> None:
    assert list(refused(compose_run_config, overrides.split())) == [field]


def test_what_is_written_inside_a_doubtful_group_counts(tmp_path: Path) -> None:
    written = [
        "experiment=mine",
        "topology.ep=8",
        "model.n_routed_experts=20",
        "model.n_group=7",
        "training.device=tpu",
    ]
    problems = refused(compose_run_config, written)
    assert problems.keys() == {"experiment", "topology.ep", "model.n_group", "training.device"}
    problems = refused(compose_run_config, written, tmp_path / "nowhere")
    assert problems.keys() == {"--config-dir", "experiment", "topology.ep", "model.n_group", "training.device"}


def test_a_users_experiment(tmp_path: Path) -> None:
    directory = own_file(
        tmp_path / "it's (mine), v2",
        "experiment/long.yaml",
        "# @package _global_\ndefaults:\n  - override /topology: ep4\n  - override /model: wide\n"
        "training:\n  tokens: 2e9\n",
    )
    own_file(directory, "model/wide.yaml", "name: wide\nhidden_size: 256\n")
    config = compose_run_config(["experiment=long", "training.seed=7"], directory)
    assert (config.topology.ep, config.model.hidden_size, config.training.tokens) == (4, 256, 2 * 10**9)
    assert config.training.seed == 7

    problems = refused(compose_run_config, ["experiment=lang", "model=narrow"], directory)
    assert_says(problems["experiment"], "did you mean long.*there are: .*quickstart")
    assert_says(problems["model"], ", ".join(sorted([*MODELS, "wide"])))


def test_a_users_directory_that_is_not_there(tmp_path: Path) -> None:
    assert refused(compose_run_config, [], tmp_path / "nowhere").keys() == {"--config-dir"}


def test_a_users_file_that_could_never_be_chosen(tmp_path: Path) -> None:
    directory = own_file(tmp_path, "model/tiny.yaml", "hidden_size: 256\n")
    problems = refused(compose_run_config, ["model=tiny"], directory)
    assert_says(problems["--config-dir"], r"tiny\.yaml.*rename")


@pytest.mark.parametrize(
    ("text", "field", "hint"),
    [
        ("# @package _global_\ntraining: [1\n", "mine.yaml: line 3", "expected ',' or '\\]'"),
        ("# @package _global_\ndefaults:\n  - override /model: huge\n", "command line", "Could not find 'model/huge'"),
        ("# @package _global_\ntraining:\n  tokns: 5\n", "training.tokns", "did you mean tokens?"),
        ("training:\n  tokens: 5\n", "experiment", "must be: # @package _global_"),
        ("training:\n  seed: 5\n  seed: 6\n", "mine.yaml: line 3", "'seed': is a repeated key"),
        (
            '# @package _global_\ntraining:\n  run_dir: "a\\0b"\n',
            "training.run_dir",
            r"'a\\x00b': contains a NUL character",
        ),
        (f"training:\n  tokens: 1{'0' * 5000}\n", "mine.yaml", "is not a YAML configuration"),
    ],
    ids=["not-yaml", "unknown-choice", "unknown-key", "no-package", "key-twice", "NUL", "digits"],
)
def test_a_users_file_that_is_wrong(tmp_path: Path, text: str, field: str, hint: str) -> None:
    directory = own_file(tmp_path, "experiment/mine.yaml", text)
    problems = refused(compose_run_config, ["experiment=mine"], directory)
    assert [name.rpartition("/")[2] for name in problems] == [field]
    (said,) = problems.values()
    assert_says(said, hint)


def awkward() -> RunConfig:
    """Return values that YAML could read as another type."""
    config = compose_run_config([])
    return replace(
        config,
        model=replace(
            config.model, name="1e3", q_lora_rank=None, rope_scaling=YarnConfig(factor=4.0), rms_norm_eps=1e-12
        ),
        training=replace(
            config.training,
            run_dir="null",
            sample_prompt="yes: 'no'\n# ${dollar} \\${é ${ ",
            tokens=10**15,
            mtp_loss_scaling_factor={0: 0.3, 10**13: 0.1},
        ),
        data=replace(config.data, validation=("on", "0x10", "~")),
    )


@pytest.mark.parametrize("name", ["awkward", *RUNS])
def test_the_printed_configuration_reads_back_to_the_same_run(tmp_path: Path, name: str) -> None:
    config = awkward() if name == "awkward" else compose_run_config([f"experiment={name}", "training.seed=5"])
    directory = own_file(tmp_path, "experiment/again.yaml", config_to_yaml(config))
    assert compose_run_config(["experiment=again"], directory) == config


def assert_says(text: str, pattern: str) -> None:
    assert re.search(pattern, text, re.DOTALL), text


def deepseeks(*overrides: str) -> list[str]:
    return [f"data.tokenizer={deepseek_tokenizer_folder()}", "data.vocab_size=null", *overrides]


def test_null_takes_the_number_of_token_ids(tmp_path: Path) -> None:
    config = compose_run_config(deepseeks("model.vocab_size=null"))
    assert (config.model.vocab_size, config.data.vocab_size) == (129280, None)
    (path := tmp_path / "config.yaml").write_text(config_to_yaml(config))
    assert read_config(path) == config  # resolved once
    assert compose_run_config(["data.vocab_size=512", "model.vocab_size=null"]).model.vocab_size == 512
    save_model(Model(SHAPE), tmp_path / "saved")
    started = [f"training.start_from={tmp_path / 'saved'}", "data.vocab_size=null", "model.vocab_size=null"]
    assert compose_run_config(started).model.vocab_size == SHAPE.vocab_size


def test_null_without_a_tokenizer_is_one_problem(tmp_path: Path) -> None:
    null = "model.vocab_size=null"
    missing = refused(compose_run_config, [f"data.tokenizer={tmp_path}/none", "data.vocab_size=null", null])
    assert list(missing) == ["data.tokenizer"]
    assert "does not exist; name a tokenizer.json" in missing["data.tokenizer"]
    assert list(refused(compose_run_config, ["data.vocab_size=null", null])) == ["data.vocab_size"]
    assert list(refused(compose_run_config, ["data.vocab_size=many", null])) == ["data.vocab_size"]
    nowhere = refused(compose_run_config, [f"training.start_from={tmp_path}/none", "data.vocab_size=null", null])
    assert list(nowhere) == ["checkpoint"]


def test_without_null_no_tokenizer_is_read(tmp_path: Path) -> None:
    missing = [f"data.tokenizer={tmp_path}/none", "data.vocab_size=null"]
    assert compose_run_config(["experiment=deepseek_v3_h800", *missing]).data.tokenizer == f"{tmp_path}/none"
    assert compose_run_config(deepseeks("model=v2_lite_16b")).model.vocab_size == 102400  # a launch refuses it
