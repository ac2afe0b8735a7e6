"""Damage that keeps a file well-formed: values of the right type that contradict each other or the other files."""

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

Edit = Callable[[Random, Any], object]
"""A function that changes a tree in place; `Random` chooses where."""


def edit(random: Random, tree: Any, edits: Sequence[Edit]) -> Any:
    """Return `tree` after one of `edits` that changes it."""
    before = repr(tree)
    while repr(tree) == before:
        random.choice(edits)(random, tree)
    return tree


def setting(*keys: Any, to: Any) -> Edit:
    """Return an edit that replaces the value under `keys`; a function `to` is applied to the old value."""

    def change(random: Random, tree: Any) -> None:
        for key in keys[:-1]:
            tree = tree[key]
        tree[keys[-1]] = to(tree.get(keys[-1]) if isinstance(tree, dict) else tree[keys[-1]]) if callable(to) else to

    return change


def leaving_out(*keys: Any) -> Edit:
    """Return an edit that removes the key, if it is there."""

    def change(random: Random, tree: Any) -> None:
        for key in keys[:-1]:
            tree = tree[key]
        tree.pop(keys[-1], None)

    return change


def _a_tensor(random: Random, tree: Any) -> Any:
    return tree["tensors"][random.choice(sorted(tree["tensors"]))]


def _in_tensor(change: Callable[[Random, list[Any]], object]) -> Edit:
    return lambda random, tree: change(random, _a_tensor(random, tree))


def _set(index: int, value: Any) -> Edit:
    return _in_tensor(lambda random, tensor: tensor.__setitem__(index, value))


def _piece(index: int, to: Callable[[Any], Any]) -> Edit:
    """Return an edit of a tensor's first piece: its file, first byte, first element, elements or hash."""

    def change(random: Random, tensor: list[Any]) -> None:
        tensor[2][0][index] = to(tensor[2][0][index])

    return _in_tensor(change)


def _halves(random: Random, tensor: list[Any]) -> None:
    """Split a tensor into two pieces that are whole, except for their hashes."""
    (piece,) = tensor[2]
    file, begin, first, elements, sha256 = piece
    half = elements // 2
    width = 2 if tensor[0] == "BF16" else 4
    tensor[2] = [[file, begin, first, half, sha256], [file, begin + width * half, half, elements - half, sha256]]


def _on_another(random: Random, tree: Any) -> None:
    _a_tensor(random, tree)[2][0][1] = _a_tensor(random, tree)[2][0][1]


def _swap(random: Random, tree: Any) -> None:
    one, two = (_a_tensor(random, tree) for _ in range(2))
    one[:], two[:] = list(two), list(one)


def _remove_tensor(random: Random, tree: Any) -> None:
    del tree["tensors"][random.choice(sorted(tree["tensors"]))]


def _turn(random: Random, tree: Any) -> None:
    tensor = _a_tensor(random, tree)
    tensor[1] = tensor[1][::-1] if len(tensor[1]) > 1 else [1, *tensor[1]]


def _tensors_first(random: Random, tree: Any) -> None:
    rest = {key: tree.pop(key) for key in list(tree) if key != "tensors"}
    tree.update(rest)


CHECKPOINT: tuple[Edit, ...] = (
    setting("format", to=1),
    setting("format", to=2.0),
    setting("attachments", to=lambda old: old * 2),
    setting("attachments", 0, "file", to="manifest.json"),
    setting("attachments", 0, "file", to="part_00000.safetensors"),
    setting("attachments", 0, "file", to="sub/tokenizer.json"),
    setting("attachments", 0, "sha256", to="0" * 63),
    setting("attachments", 0, "sha256", to="0" * 64),
    setting("attachments", 0, "bytes", to=lambda old: old + 1),
    setting("attachments", to=[]),
    setting("files", "part_00000.safetensors", to=lambda old: old + 1),
    setting("files", "absent.safetensors", to=5),
    setting("metadata", "step", to=-1),
    setting("metadata", "config", "training", to={"sequence_length": 0}),
    setting("metadata", "config", "topology", to={"pp": 2, "edp": "x"}),
    setting("metadata", "config", "model", "hidden_size", to=32),
    setting("metadata", "config", "model", "rope_theta", to=float("inf")),
    setting("metadata", "config", "model", "initializer_range", to=10**400),
    setting("metadata", "config", "model", "norm_topk_prob", to=1),
    setting("metadata", "source", to={"eos_token_id": ["x"]}),
    _set(0, "F8_E5M2"),
    _set(0, "I32"),
    _set(1, [2**40, 2**40]),
    _set(2, []),
    _set(2, {}),
    _in_tensor(lambda random, tensor: tensor.pop()),
    _in_tensor(_halves),
    _piece(0, lambda old: "absent.safetensors"),
    _piece(1, lambda old: old + 10**6),
    _piece(1, lambda old: old + 4),
    _piece(2, lambda old: old + 1),
    _piece(3, lambda old: old + 1),
    _piece(3, float),
    _piece(4, lambda old: old[::-1]),
    _on_another,
    _swap,
    _remove_tensor,
    _turn,
    _tensors_first,
)  # fmt: skip

DATA: tuple[Edit, ...] = (
    setting("train", "tokens", to=lambda old: old + 1),
    setting("train", "tokens", to=2**62),
    setting("validation", "documents", to=0),
    setting("settings", "vocab_size", to=2**20),
    setting("settings", "vocab_size", to=2),
    setting("settings", "eos_token_id", to=2**40),
    setting("settings", "shard_tokens", to=1),
    setting("settings", "tokenizer_sha256", to="f" * 64),
    setting("settings", "fim_token_ids", to=[1, -1]),
    setting("parts", "sha256", to="f" * 64),
    setting("parts", "bytes", to=0),
    setting("parts", "file", to="tokenizer.json"),
    setting("tokenizer", "sha256", to="f" * 64),
    setting("tokenizer", "file", to="absent.json"),
    setting("tokenizer_config", to={"file": "tokenizer.json", "bytes": 3, "sha256": "f" * 64}),
    setting("format", to=1),
)  # fmt: skip
DATA_PARTS: tuple[Edit, ...] = (
    setting(0, "train", "tokens", to=lambda old: old + 1),
    setting(0, "train", "tokens", to=2**62),
    setting(0, "train", "documents", to=0),
    setting(0, "train", to=None),
    setting(0, "train", "starts", "file", to="manifest.json"),
    setting(0, "train", "starts", "bytes", to=lambda old: old + 8),
    setting(0, "train", "shards", 0, "file", to="tokenizer.json"),
    setting(0, "train", "shards", to=lambda old: old * 2),
    setting(0, "train", "shards", to=[]),
    setting(0, "train", "shards", 0, "bytes", to=lambda old: old - 2),
    setting(0, "train", "shards", 0, "sha256", to="f" * 64),
    setting(0, "task", to="../../x"),
    setting(0, "pieces", to=[]),
)  # fmt: skip

_YARN = "rope_scaling"
CONFIG: tuple[Edit, ...] = (
    setting(_YARN, "original_max_position_embeddings", to=32.5),
    setting(_YARN, "original_max_position_embeddings", to=0),
    leaving_out(_YARN, "original_max_position_embeddings"),
    leaving_out(_YARN, "factor"),
    leaving_out(_YARN, "mscale"),
    setting(_YARN, "mscale", to=0.0),
    setting(_YARN, to=lambda old: {**old, "mscale": None, "mscale_all_dim": None}),
    setting(_YARN, "truncate", to=False),
    setting(_YARN, "attention_factor", to=1.5),
    setting(_YARN, "beta_fast", to=-1.0),
    setting(_YARN, "factor", to=1e308),
    setting(_YARN, to={"type": "linear", "factor": 2.0}),
    setting("rope_parameters", to={"rope_type": "default", "rope_theta": float("inf")}),
    setting("rope_parameters", to={"rope_type": "default", "rope_theta": 10**400}),
    setting("eos_token_id", to=[0, 1]),
    setting("eos_token_id", to=[0, "1"]),
    setting("eos_token_id", to=-1),
    setting("bos_token_id", to=2**40),
    setting("max_position_embeddings", to=0),
    setting("num_key_value_heads", to=1),
    setting("num_key_value_heads", to=2.0),
    setting("num_nextn_predict_layers", to=0),
    setting("num_nextn_predict_layers", to=2),
    leaving_out("num_nextn_predict_layers"),
    setting("num_hidden_layers", to=3),
    setting("num_hidden_layers", to=4096),
    setting("num_hidden_layers", to=1),
    setting("n_routed_experts", to=65536),
    setting("n_routed_experts", to=8),
    setting("first_k_dense_replace", to=2),
    setting("hidden_size", to=15),
    setting("qk_rope_head_dim", to=3),
    setting("moe_intermediate_size", to=9),
    setting("n_shared_experts", to=0),
    setting("topk_group", to=3),
    setting("num_experts_per_tok", to=4),
    setting("q_lora_rank", to=None),
    setting("rms_norm_eps", to=-1.0),
    setting("initializer_range", to=1e400),
    setting("scoring_func", to="softmax"),
    setting("moe_layer_freq", to=True),
    setting("quantization_config", to={"quant_method": "fp8", "weight_block_size": [64, 64]}),
    setting("quantization_config", to={"quant_method": ["fp8"], "weight_block_size": 128}),
    setting("architectures", to="Llama"),
    setting("name", to="another"),
    leaving_out("vocab_size"),
)  # fmt: skip


def _entry(**values: Any) -> Edit:
    """Return an edit of a tensor in a safetensors header."""

    def change(random: Random, tree: Any) -> None:
        name = random.choice([name for name in tree if name != "__metadata__"])
        tree[name].update(values)

    return change


def _rename(random: Random, tree: Any) -> None:
    name = random.choice([name for name in tree if name != "__metadata__"])
    tree[random.choice([f"{name}_scale_inv", name.replace("layers.1", "layers.9"), "x", ""])] = tree.pop(name)


def _flatten(random: Random, tree: Any) -> None:
    """Change the shape, but not the number of elements."""
    entry = tree[random.choice([name for name in tree if name != "__metadata__"])]
    entry["shape"] = random.choice([[*entry["shape"], 1], [1, *entry["shape"]], entry["shape"][::-1], [0]])


def _other_dtype(random: Random, tree: Any) -> None:
    """Change the dtype, but not the number of bytes."""
    same = {"F32": ["I32"], "BF16": ["F16", "I16"], "F8_E4M3": ["U8", "BOOL", "F8_E8M0", "F8_E5M2"]}
    entry = tree[random.choice([name for name in tree if name != "__metadata__"])]
    entry["dtype"] = random.choice(same.get(entry["dtype"], ["I64"]))


def _shift(random: Random, tree: Any) -> None:
    """Move the data so that they overlap or leave a hole."""
    entry = tree[random.choice([name for name in tree if name != "__metadata__"])]
    by = random.choice([-2, 2, 64, 10**6])
    entry["data_offsets"] = [max(0, offset + by) for offset in entry["data_offsets"]]


def _scale(change: Callable[[dict[str, Any], str], object]) -> Edit:
    """Return an edit of the scales of an FP8 weight, if there are any."""

    def edit_one(random: Random, tree: Any) -> None:
        names = [name for name in tree if name.endswith("_scale_inv")]
        if names:
            change(tree, random.choice(names))

    return edit_one


HEADER: tuple[Edit, ...] = (
    _rename, _flatten, _other_dtype, _other_dtype, _shift, _shift, _entry(shape=[2**31, 2**31]), _entry(shape=[-1]),
    _entry(data_offsets=[5]), _entry(data_offsets=[9, 3]), _entry(dtype="F4"), _entry(extra=1),
    _scale(lambda tree, name: tree[name].update(dtype="I32")),
    _scale(lambda tree, name: tree[name].update(shape=[1, *tree[name]["shape"]])),
    _scale(lambda tree, name: tree.update({"model.norm.weight_scale_inv": tree.pop(name)})),
    _scale(lambda tree, name: tree.update({"x": tree.pop(name)})),
    setting("__metadata__", to={"format": 5}), setting("__metadata__", to=[]), setting("twin", to=5),
)  # fmt: skip


def _record(of: str, /, **values: Any) -> Edit:
    """Return an edit of all ledger records of a kind."""

    def change(random: Random, tree: Any) -> None:
        for record in tree:
            if record["kind"] == of:
                record.update(values)

    return change


INHERITED = {
    "attempt": "first", "boot": "boot", "from_gpu_ms": 5000, "from_head": "a" * 64, "from_tokens_consumed": 10,
    "from_tokens_retained": 10, "kind": "inherited", "monotonic_ns": 0, "wall_ns": 1_800_000_000_000_000_000,
}  # fmt: skip


def _inherit(**values: Any) -> Edit:
    return lambda random, tree: tree.insert(1, INHERITED | values)


def _move(random: Random, tree: Any) -> None:
    tree.insert(random.randrange(len(tree)), tree.pop(random.randrange(len(tree))))


RECORDS: tuple[Edit, ...] = (
    _record("begin", phase="post_train"),
    _record("open", phase="pretrain"),
    _record("interval", bucket="coffee"),
    _record("open", budget_gpu_hours=-1.0),
    _record("open", budget_gpu_hours=10**400),
    _record("begin", budget_gpu_hours=float("inf")),
    _record("open", ranks=10**8),
    _record("close", reason=["x"]),
    _record("end", clean="yes"),
    _record("terms", us={}),
    _record("step", gpu_ms=2**53, tokens=2**53),
    _record("step", gpu_ms=2**54),
    _record("step", step=0),
    _record("step", monotonic_ns=-(2**63)),
    _record("step", wall_ns=2**63 - 1),
    _record("open", wall_ns=-(2**63)),
    _record("resume", step=10**9),
    _record("ready", boot="another"),
    _record("open", job="12", from_allocation_head="b" * 64),
    _record("open", job=5),
    _record("begin", attempt=""),
    _record("open", attempt="é\u2028" * 100),
    _record("step", kind="unheard"),
    _inherit(),
    _inherit(),
    _inherit(from_head=5),
    _inherit(from_gpu_ms=-5),
    _inherit(from_tokens_retained=10**15),
    _move,
)  # fmt: skip


def _token(random: Random, tree: Any) -> None:
    vocabulary = tree["model"]["vocab"]
    del vocabulary[random.choice(sorted(vocabulary))]


TOKENIZER: tuple[Edit, ...] = (
    setting("added_tokens", to=[]),
    setting("added_tokens", 0, "content", to="<s>"),
    setting("added_tokens", 0, "id", to=2**31),
    setting("added_tokens", 1, "id", to=0),
    setting("added_tokens", to=lambda old: [*old, {**old[0], "id": 300, "content": "<x>"}]),
    leaving_out("added_tokens"),
    setting("model", "merges", to=lambda old: old[::-1]),
    setting("model", "merges", to=[["a"]]),
    setting("model", "vocab", "<x>", to=2**32 - 1),
    setting("model", "type", to="WordPiece"),
    setting("model", "type", to=None),
    setting("normalizer", to={"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}),
    setting("pre_tokenizer", to={"type": "Split", "pattern": {"Regex": "(?"}, "behavior": "Isolated", "invert": False}),
    setting("pre_tokenizer", to=None),
    setting("decoder", to=None),
    setting("truncation", to={"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 5}),
    setting("padding", to={"strategy": {"Fixed": 2**40}, "direction": "Right", "pad_id": 0, "pad_type_id": 0,
                           "pad_token": "x", "pad_to_multiple_of": None}),
    _token,
    _token,
)  # fmt: skip
