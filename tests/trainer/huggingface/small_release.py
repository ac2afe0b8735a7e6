"""Small exported models, and the logits of transformers and of our model."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DeepseekV3ForCausalLM

from shoestring.tests.reference.configs import random_params, reference_configs
from shoestring.tests.reference.deepseek_v3 import ReferenceConfig
from shoestring.tests.trainer.checkpoint.saved import save_params
from shoestring.trainer.checkpoint.checkpoint import Checkpoint
from shoestring.trainer.huggingface.export import ExportOptions, export_checkpoint
from shoestring.trainer.model.config import ModelConfig

CONFIGS = reference_configs()
SMALL_SHARDS = 60_000


def silent(_: str) -> None:
    pass


def params_of(name: str, seed: int = 3) -> tuple[ReferenceConfig, dict[str, Tensor]]:
    return CONFIGS[name], random_params(CONFIGS[name], seed, torch.float32)


def exported(name: str, root: Path, **options: Any) -> tuple[Checkpoint, Path]:
    config, params = params_of(name)
    checkpoint = save_params(config, params, root / "store")
    export_checkpoint(checkpoint, root / "out", ExportOptions(**options), silent)
    return checkpoint, root / "out"


def their_model(directory: Path) -> DeepseekV3ForCausalLM:
    model = DeepseekV3ForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    assert isinstance(model, DeepseekV3ForCausalLM)
    return model


def on_disk(directory: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


WIDE = ModelConfig(
    name="wide",
    vocab_size=96,
    hidden_size=160,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    num_attention_heads=2,
    q_lora_rank=136,
    kv_lora_rank=32,
    qk_nope_head_dim=48,
    qk_rope_head_dim=16,
    v_head_dim=72,
    intermediate_size=200,
    moe_intermediate_size=136,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=2,
    num_nextn_predict_layers=1,
)
"""A model wider than a block, by no multiple of it."""
