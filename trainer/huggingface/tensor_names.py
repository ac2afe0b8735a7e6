"""Tensor names of the released weights, in which MTP modules are layers after the last one."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...comm.fp8 import tiles_per_row
from ..checkpoint.pieces import MODEL_STATE
from ..checkpoint.training_state import model_tensor_shapes
from ..model.config import ModelConfig

SCALE_SUFFIX = "_scale_inv"
"""Suffix of the name of an FP8 weight's scales."""

_TOP = {
    "embedding.weight": ("model.embed_tokens.weight", "embed_tokens.weight"),
    "final_norm.weight": ("model.norm.weight", None),
    "head.weight": ("lm_head.weight", "shared_head.head.weight"),
}
"""Released name of each tensor outside of the layers, and that of its copy in an MTP module."""
_LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.q_proj.weight": "self_attn.q_proj.weight",
    "attention.q_down.weight": "self_attn.q_a_proj.weight",
    "attention.q_norm.weight": "self_attn.q_a_layernorm.weight",
    "attention.q_up.weight": "self_attn.q_b_proj.weight",
    "attention.kv_down.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attention.kv_up.weight": "self_attn.kv_b_proj.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "router.weight": "mlp.gate.weight",
    "router.bias_E": "mlp.gate.e_score_correction_bias",
    # Only in MTP modules.
    "embedding_norm.weight": "enorm.weight",
    "hidden_norm.weight": "hnorm.weight",
    "project.weight": "eh_proj.weight",
    "final_norm.weight": "shared_head.norm.weight",
}


@dataclass(frozen=True)
class TensorMapping:
    """Mapping of one checkpoint tensor to Hugging Face tensors."""

    name: str
    """Name in the checkpoint."""
    shape: tuple[int, ...]
    hf_names: tuple[str, ...]
    """Names of the equal parts that it is split into along its first dimension."""
    hf_duplicates: tuple[str, ...] = ()
    """Further names of the first part: the MTP modules of the released weights repeat embedding and head."""
    rope_rows: tuple[int, int] | None = None
    """Rows per head, and the number of rotated rows at its end."""

    @property
    def all_hf_names(self) -> tuple[str, ...]:
        """Names of the parts and of the duplicates."""
        return (*self.hf_names, *self.hf_duplicates)

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Shape of each part."""
        return (self.shape[0] // len(self.hf_names), *self.shape[1:])

    @property
    def hf_scale_shape(self) -> tuple[int, int]:
        """Shape of the scales of each part in FP8, one per block of 128 × 128 of a matrix."""
        rows, columns = self.hf_shape
        return tiles_per_row(rows), tiles_per_row(columns)

    @property
    def layer_index(self) -> int:
        """Sort key: -1 for the embedding, the layer number, or a number after all layers."""
        number = self.hf_names[0].removeprefix("model.layers.").partition(".")[0]
        return int(number) if number.isdecimal() else -1 if self.name == f"{MODEL_STATE}/embedding.weight" else 10**9


def make_tensor_mappings(config: ModelConfig) -> list[TensorMapping]:
    """Return the mappings of the whole model in model order."""
    found = [_entry(name, shape, config) for name, shape in model_tensor_shapes(config).items()]
    return sorted(found, key=lambda entry: entry.layer_index)  # stable: within a layer the model's order is kept


def is_fp8_weight(released: str) -> bool:
    """Return True if a weight is FP8 in an FP8 checkpoint: all projections of layers, but not MTP's `eh_proj`."""
    return "_proj" in released and not released.endswith("eh_proj.weight")


def reorder_rope_rows(weight: Tensor, rotated: tuple[int, int], *, to_halves: bool) -> Tensor:
    """Reorder rotated rows from adjacent pairs (x0, x1), (x2, x3), … to x0, x2, … followed by x1, x3, …, or back."""
    head, width = rotated
    order = torch.cat((torch.arange(0, width, 2), torch.arange(1, width, 2)))
    rows = torch.arange(head)
    rows[head - width :] = head - width + (order if to_halves else order.argsort())
    reordered: Tensor = weight.unflatten(0, (-1, head))[:, rows].flatten(0, 1)
    return reordered


def _entry(name: str, shape: tuple[int, ...], config: ModelConfig) -> TensorMapping:
    ours, _, expert = name.removeprefix(f"{MODEL_STATE}/").partition("/expert_")
    layers = config.num_hidden_layers
    if ours in _TOP:
        main, copy = _TOP[ours]
        modules = range(layers, layers + config.num_nextn_predict_layers) if copy else ()
        return TensorMapping(name, shape, (main,), tuple(f"model.layers.{module}.{copy}" for module in modules))
    kind, number, rest = ours.split(".", 2)
    prefix = f"model.layers.{int(number) + (layers if kind == 'mtp' else 0)}"
    rest = rest.removeprefix("layer.")
    if rest in _LAYER:
        return TensorMapping(name, shape, (f"{prefix}.{_LAYER[rest]}",), rope_rows=_rope_rows(rest, shape, config))
    module, matrix = rest.split(".")[:2]
    where = {"ffn": "mlp", "shared": "mlp.shared_experts", "experts": f"mlp.experts.{int(expert or 0)}"}[module]
    parts = ("gate_proj", "up_proj") if matrix.startswith("gate_up") else ("down_proj",)
    return TensorMapping(name, shape, tuple(f"{prefix}.{where}.{part}.weight" for part in parts))


def _rope_rows(parameter: str, shape: tuple[int, ...], config: ModelConfig) -> tuple[int, int] | None:
    """Return `TensorMapping.rope_rows`; the last rows of each query head, or of the KV matrix, are rotated."""
    query = config.qk_head_dim
    rows = {"q_proj": query, "q_up": query, "kv_down": shape[0]}
    head = rows.get(parameter.removeprefix("attention.").removesuffix(".weight"))
    return None if head is None else (head, config.qk_rope_head_dim)
