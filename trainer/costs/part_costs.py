"""Costs of the parts of a model that a pipeline can place on separate stages."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from ..model.config import ModelConfig
from .parameters import build_meta_model


@dataclass(frozen=True)
class PartCost:
    """Parameters of one part, and its FLOPs per token, forward and backward (see `flops.FLOP_CONVENTION`)."""

    parameters: int
    flops: float


@dataclass(frozen=True)
class ModelPartCosts:
    """Costs of a whole model, part by part. They add up to `count_parameters` and `count_flops`."""

    embedding: PartCost
    layers: tuple[PartCost, ...]
    """Layers of the main model, in order: dense layers first."""
    head: PartCost
    """Head with the final norm."""
    mtp: PartCost
    """All MTP modules. Their FLOPs include passes through the head, whose parameters are the main model's."""

    @property
    def last_stage_extra(self) -> PartCost:
        """Costs of the last stage beyond its layers: head and MTP modules."""
        return PartCost(self.head.parameters + self.mtp.parameters, self.head.flops + self.mtp.flops)


def count_part_costs(config: ModelConfig, sequence_length: int) -> ModelPartCosts:
    """Count the costs of every part of the whole model at this sequence length."""
    model = build_meta_model(config)
    experts = model.expert_parameter_names()
    parameters: defaultdict[str, int] = defaultdict(int)
    multiplied: defaultdict[str, int] = defaultdict(int)  # weights that one token is multiplied with
    for name, parameter in model.named_parameters():
        part = _part(name)
        count = parameter.numel()
        parameters[part] += count
        if parameter.ndim > 1 and part != "embedding":
            multiplied[part] += (
                count * config.num_experts_per_tok // config.n_routed_experts if name in experts else count
            )
    attention = attention_flops(config, sequence_length)
    mtp_flops = (
        6.0 * (multiplied["mtp"] + config.num_nextn_predict_layers * multiplied["head"])
        + config.num_nextn_predict_layers * attention
    )
    return ModelPartCosts(
        embedding=PartCost(parameters["embedding"], 0.0),
        layers=tuple(
            PartCost(parameters[name], 6.0 * multiplied[name] + attention)
            for name in (f"layers.{index}" for index in range(config.num_hidden_layers))
        ),
        head=PartCost(parameters["head"], 6.0 * multiplied["head"]),
        mtp=PartCost(parameters["mtp"], mtp_flops),
    )


def attention_flops(config: ModelConfig, sequence_length: int) -> float:
    """Return FLOPs per token and layer of core attention, forward and backward, causal: half of S x S."""
    return 3.0 * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * sequence_length


def _part(name: str) -> str:
    """Return the part that the parameter `name` belongs to."""
    top, *rest = name.split(".")
    if top == "layers":
        return f"layers.{rest[0]}"
    return {"embedding": "embedding", "final_norm": "head", "head": "head", "mtp": "mtp"}[top]
