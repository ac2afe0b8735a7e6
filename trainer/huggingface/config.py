"""Conversion between `config.json` of `DeepseekV3ForCausalLM` and `ModelConfig`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, get_type_hints

from ...comm.errors import Problem, collect_problems, raise_if_any
from ...comm.files.file_io import config_error_context
from ...comm.files.strict_json import JsonValue
from ...comm.fp8 import TILE_WIDTH
from ..model.config import ModelConfig, YarnConfig

_NOT_SHARED = ("name", "scoring_func", "num_nextn_predict_layers", "rope_theta", "rope_scaling")
_SHARED = tuple(field.name for field in fields(ModelConfig) if field.name not in _NOT_SHARED)
"""Fields of `ModelConfig` that a `config.json` must have, under the same names."""

_CONSTANTS: Mapping[str, object] = {
    "model_type": "deepseek_v3",
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
}
"""Keys with one supported value, which is also that of a missing key; `ModelConfig` has no field for them."""
_ONE_WAY: Mapping[str, object] = {**_CONSTANTS, "scoring_func": "sigmoid"}
"""Keys for which an import supports one value."""

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_CARRIED = (*_TOKENS, "max_position_embeddings")
"""Keys that change no computation here; an import keeps them, and an export writes them back."""
_WITHOUT_EFFECT = frozenset(
    {
        *(*_CARRIED, "architectures", "auto_map", "transformers_version", "torch_dtype", "dtype"),
        *("quantization_config", "use_cache", "ep_size", "pretraining_tp"),
        *("aux_loss_alpha", "seq_aux"),
    }
)
"""Keys of a released `config.json` that describe files or inference, or that other groups of a run set."""
_READ = frozenset(
    {
        *("architectures", "num_key_value_heads", "num_nextn_predict_layers", "num_mtp_layers", "rope_theta"),
        *("rope_scaling", "rope_parameters", "rope_interleave", "quantization_config", "torch_dtype", "dtype"),
        *("attention_factor", "truncate"),
    }
)
"""Further keys that an import reads, or that follow from the weights and the export options."""
_LONGEST = 2**31
"""Most positions: more than any context, and within every reader's integers."""
_LARGEST: Mapping[str, float] = {
    "rms_norm_eps": 1e3,
    "initializer_range": 1e3,
    "routed_scaling_factor": 1e6,
    "rope_theta": 1e18,
    "factor": _LONGEST,
    "beta_fast": _LONGEST,
    "beta_slow": _LONGEST,
    "mscale": 1e3,
    "mscale_all_dim": 1e3,
    "attention_factor": 1e3,
}
"""Largest value of each number: far more than any model has, and far less than would overflow FP32."""
_ARCHITECTURE = "DeepseekV3ForCausalLM"
_STORED = ("bfloat16", "float16", "float32", "float64", "float8_e4m3fn")
"""Dtypes that `torch_dtype` or `dtype` may name; the tensor files determine the actual dtype."""
_FILE = "config.json"

_YARN = tuple(field.name for field in fields(YarnConfig))


def to_config_json(
    model: ModelConfig,
    *,
    dtype: str,
    fp8: bool,
    rope_interleave: bool,
    max_position_embeddings: int,
    source: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the contents of `config.json`. Raises `ConfigError` for a model that it cannot express.

    `max_position_embeddings` is the sequence length of training. RoPE settings have the released file's form, which
    vLLM and SGLang also read. `source` is the `config.json` of imported weights: its special tokens and context length
    are written back.
    """
    raise_if_any(_unknown_there(model))
    tree: dict[str, Any] = {"architectures": [_ARCHITECTURE]}
    tree |= _ONE_WAY
    tree |= {key: model.__dict__[key] for key in _SHARED}
    tree |= {
        "num_key_value_heads": model.num_attention_heads,
        "num_nextn_predict_layers": model.num_nextn_predict_layers,
        "rope_theta": model.rope_theta,
        "rope_scaling": None,
        "rope_interleave": rope_interleave,
        "max_position_embeddings": max_position_embeddings,
        "torch_dtype": dtype,
        **dict.fromkeys(_TOKENS),
    }
    if model.rope_scaling is not None:
        tree["rope_scaling"] = {"type": "yarn"} | asdict(model.rope_scaling)
        tree["max_position_embeddings"] = round(
            model.rope_scaling.factor * model.rope_scaling.original_max_position_embeddings
        )
    if source is not None:
        raise_if_any(_carried_problems(source))
        tree |= {key: source[key] for key in _CARRIED if source.get(key) is not None}
    if fp8:
        tree["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [TILE_WIDTH, TILE_WIDTH],
        }
    return tree


def parse_config_json(tree: Mapping[str, Any], name: str) -> ModelConfig:
    """Return the model of a `config.json`. Raises `ConfigError` with everything that the model does not support."""
    problems: list[Problem] = []
    read = _Reader(JsonValue(dict(tree)), problems)
    rope = read.rope()
    values = read.shared_fields()
    mtp = read.num_mtp_layers()
    theta = read.rope_theta(rope)
    if "rope_interleave" in read.tree:
        read.value(read.tree["rope_interleave"], bool)
    read.check_names()
    problems += [*_carried_problems(tree), *_unknown_here(tree, rope)]
    raise_if_any(problems)
    yarn = _yarn(rope) if read_rope_type(rope) == "yarn" else None
    model = ModelConfig(
        name=name, scoring_func="sigmoid", num_nextn_predict_layers=mtp, rope_theta=theta, rope_scaling=yarn, **values
    )
    raise_if_any(problem.with_prefix(_FILE) for problem in model.problems())
    return model


def remove_released_keys(model: dict[str, Any]) -> tuple[list[Problem], list[str]]:
    """Remove the keys of a released `config.json` that `ModelConfig` has no field for from a composed `model` group.

    Return a problem for each key whose value is not implemented, and the keys that have no effect.
    """
    problems = [*_unsupported(model, _CONSTANTS, "model.", "is not implemented")]
    if dropout := model.pop("attention_dropout", 0):
        problems.append(Problem("model.attention_dropout", dropout, "is not implemented: only 0 is supported"))
    ignored = sorted(_WITHOUT_EFFECT.intersection(model))
    for key in (*_CONSTANTS, *ignored):
        model.pop(key, None)
    heads = model.get("num_attention_heads")
    groups = model.pop("num_key_value_heads", heads)
    if groups != heads:
        hint = f"is not implemented: latent attention has as many as query heads, {heads}"
        problems.append(Problem("model.num_key_value_heads", groups, hint))
    rope = model.get("rope_scaling")
    if isinstance(rope, dict):
        for key in ("type", "rope_type"):
            kind = rope.pop(key, "yarn")
            if kind != "yarn":
                hint = "is not implemented: only 'yarn' is supported"
                problems.append(Problem(f"model.rope_scaling.{key}", kind, hint))
    return problems, ignored


def ignored_config_keys(tree: Mapping[str, Any]) -> list[str]:
    """Return the keys of a `config.json` that an import ignores and an export does not write back."""
    known = {*_SHARED, *_ONE_WAY, *_CARRIED, *_READ}
    return sorted(key for key in tree if key not in known)


@dataclass(frozen=True)
class _Reader:
    """Reader of `config.json` that collects all problems; an invalid value is read as an unused placeholder."""

    tree: JsonValue
    problems: list[Problem]

    def shared_fields(self) -> dict[str, Any]:
        """Return the fields of `_SHARED` that are present, with the types of `ModelConfig`."""
        kinds = get_type_hints(ModelConfig)
        # A missing key is reported by `_unknown_here`.
        return {key: self.value(self.tree[key], kinds[key]) for key in _SHARED if key in self.tree}

    def rope(self) -> Mapping[str, Any]:
        """Return the RoPE settings: `rope_scaling` before transformers 5, `rope_parameters` since; empty if absent."""
        for key in ("rope_parameters", "rope_scaling"):
            item = self.tree.get(key)
            if item is not None:
                with _collecting(self.problems):
                    settings = item.as_mapping()
                    for name in ("rope_type", "type"):
                        if name in settings:
                            item[name].as_string()
                    for name in (*_YARN, "rope_theta", "attention_factor"):
                        if settings.get(name) is not None:
                            item[name].as_number(0, _LARGEST.get(name, _LONGEST))
                    length = item.get("original_max_position_embeddings")
                    if length is not None and not length.as_number(1, _LONGEST).is_integer():
                        raise length.malformed_error("must be a whole number")
                    if settings:
                        return settings
        return {}

    def num_mtp_layers(self) -> int:
        """Return the number under the first of its two keys that is present; 0 if none is, or if it is null."""
        key = "num_nextn_predict_layers" if "num_nextn_predict_layers" in self.tree else "num_mtp_layers"
        item = self.tree.get(key)
        return 0 if item is None else int(self.value(item, int))

    def rope_theta(self, rope: Mapping[str, Any]) -> float:
        """Return the base from `rope`, else from the file, else that of a file without one."""
        item = JsonValue(dict(rope)).get("rope_theta") or self.tree.get("rope_theta")
        return 10000.0 if item is None else float(self.value(item, float))

    def check_names(self) -> None:
        """Add a problem for an unsupported architecture or dtype."""
        architectures = self.tree.get("architectures")
        if architectures is not None:
            with _collecting(self.problems):
                if [each.as_string() for each in architectures.as_list()] != [_ARCHITECTURE]:
                    raise architectures.malformed_error(f"cannot be imported: only {_ARCHITECTURE} is supported")
        for key in ("torch_dtype", "dtype"):
            item = self.tree.get(key)
            if item is not None:
                with _collecting(self.problems):
                    if item.as_string().removeprefix("torch.") not in _STORED:
                        raise item.malformed_error(f"must be one of {', '.join(_STORED)}")

    def value(self, item: JsonValue, kind: Any) -> Any:
        """Return a number or boolean of the type `kind`."""
        found: Any = 0  # placeholder after a problem; never used
        with _collecting(self.problems):
            if kind is float:
                found = item.as_number(0, _LARGEST[item.location])
            elif kind is bool:
                found = item.as_boolean()
            else:
                found = None if item.value is None and kind is not int else item.as_integer(0, _LONGEST)
        return found


@contextmanager
def _collecting(problems: list[Problem]) -> Iterator[None]:
    """Add the problem of a `MalformedFileError` that is raised inside."""
    with collect_problems(problems), config_error_context(_FILE, "correct it"):
        yield


def _carried_problems(tree: Mapping[str, Any]) -> list[Problem]:
    """Return a problem for each special token outside the vocabulary and for an invalid context length."""
    problems: list[Problem] = []
    item = JsonValue(dict(tree))
    vocabulary = tree.get("vocab_size")
    last = vocabulary - 1 if type(vocabulary) is int and vocabulary > 0 else _LONGEST
    for key in _CARRIED:
        found = item.get(key)
        with _collecting(problems):
            if found is None:
                continue
            if key == "eos_token_id" and isinstance(found.value, list):
                for each in found.as_list():
                    each.as_integer(0, last)
            elif key in _TOKENS:
                found.as_integer(-1, last)  # -1: no such token, in older files
            else:
                found.as_integer(1, _LONGEST)
    return problems


def read_rope_type(rope: Mapping[str, Any]) -> str:
    """Return `default`, `yarn`, or an unsupported type."""
    return str(rope.get("rope_type", rope.get("type", "default")))


def _yarn(rope: Mapping[str, Any]) -> YarnConfig:
    numbers = {key: float(rope[key]) for key in _YARN if rope.get(key) is not None}
    if not (numbers.get("mscale") and numbers.get("mscale_all_dim")):  # then only rotated vectors are scaled
        numbers |= {"mscale": 1.0, "mscale_all_dim": 0.0}
    return YarnConfig(original_max_position_embeddings=int(numbers.pop("original_max_position_embeddings")), **numbers)


def _unknown_there(model: ModelConfig) -> Iterator[Problem]:
    there = f"cannot be exported: {_ARCHITECTURE}"
    if model.scoring_func != "sigmoid":
        yield Problem("model.scoring_func", model.scoring_func, f"{there} supports only sigmoid")
    if model.n_shared_experts == 0:
        yield Problem("model.n_shared_experts", 0, f"{there} always has shared experts")
    if model.n_routed_experts // model.n_group < 2:
        hint = f"{there} needs two of the {model.n_routed_experts} experts in each group"
        yield Problem("model.n_group", model.n_group, hint)
    yarn = model.rope_scaling
    if yarn is not None and yarn.factor * yarn.original_max_position_embeddings > _LONGEST:
        hint = f"cannot be exported: times original_max_position_embeddings it exceeds {_LONGEST} positions"
        yield Problem("model.rope_scaling.factor", yarn.factor, hint)
    scales = None if yarn is None else (yarn.mscale, yarn.mscale_all_dim)
    if yarn is not None and scales is not None and scales != (1.0, 0.0) and 0 in scales:
        hint = "cannot be exported: a 0 in mscale or mscale_all_dim means 1 and 0 there"
        yield Problem("model.rope_scaling.mscale", yarn.mscale, hint)


def _unknown_here(tree: Mapping[str, Any], rope: Mapping[str, Any]) -> Iterator[Problem]:
    yield from _unsupported(tree, _ONE_WAY, "config.json: ", "cannot be imported")
    for key in _SHARED:
        if key not in tree:  # its writer relied on defaults, which differ between libraries
            yield Problem(f"config.json: {key}", None, "is missing; write it there, as transformers does when it saves")
    heads = tree.get("num_attention_heads")
    groups = tree.get("num_key_value_heads", heads)
    if groups is not None and (groups != heads or type(groups) is not type(heads)):
        hint = f"cannot be imported: latent attention has as many as query heads, {heads}"
        yield Problem("config.json: num_key_value_heads", tree["num_key_value_heads"], hint)
    yield from _unknown_rotation(rope)
    quantization = tree.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        if method != "fp8" or quantization.get("weight_block_size") != [TILE_WIDTH, TILE_WIDTH]:
            hint = f"cannot be imported: only fp8 with weight_block_size [{TILE_WIDTH}, {TILE_WIDTH}] can"
            yield Problem("config.json: quantization_config", quantization, hint)


def _unsupported(
    tree: Mapping[str, Any], constants: Mapping[str, object], prefix: str, words: str
) -> Iterator[Problem]:
    """Yield a problem for each key that has another value than its supported one."""
    for key, supported in constants.items():
        found = tree.get(key, supported)
        if found != supported or type(found) is not type(supported):  # 0 is not false
            yield Problem(f"{prefix}{key}", tree[key], f"{words}: only {supported!r} is supported")


def _number_of(rope: Mapping[str, Any], key: str) -> float:
    """Return a valid number; 0 for any other value, which is reported elsewhere."""
    found: object = rope.get(key)
    return float(found) if isinstance(found, int | float) and 0 <= found <= _LONGEST else 0.0


def _unknown_rotation(rope: Mapping[str, Any]) -> Iterator[Problem]:
    kind = read_rope_type(rope)
    if kind not in ("default", "yarn"):
        yield Problem("config.json: rope type", kind, "cannot be imported: only default and yarn are supported")
    if kind != "yarn":
        return
    for key in ("original_max_position_embeddings", "factor"):
        if rope.get(key) is None:
            yield Problem(f"config.json: {key}", None, "is missing from the rotary settings")
    length, factor = (_number_of(rope, key) for key in ("original_max_position_embeddings", "factor"))
    if length * factor > _LONGEST:
        hint = f"times original_max_position_embeddings it exceeds {_LONGEST} positions"
        yield Problem("config.json: factor", rope["factor"], hint)
    for key, standard in (("attention_factor", None), ("truncate", True)):
        if rope.get(key, standard) != standard:
            yield Problem(f"config.json: {key}", rope[key], f"cannot be imported: only {standard} is supported")
    if rope.get("mscale_all_dim") and not rope.get("mscale"):
        hint = "cannot be imported without mscale: both or neither must be set"
        yield Problem("config.json: mscale_all_dim", rope["mscale_all_dim"], hint)
