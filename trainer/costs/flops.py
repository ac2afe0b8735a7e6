"""Floating point operations per training token, of the whole model and of the parts that a pipeline can place."""

from dataclasses import dataclass

from ..model.config import ModelConfig
from .parameters import ModelPart, count_model_parts

FLOP_CONVENTION = (
    "model FLOPs: 2 per multiply-add, backward = 2 x forward, causal attention (half of S x S), "
    "with router and head, without embedding look-up and recomputation"
)


@dataclass(frozen=True)
class PartCost:
    """Parameters of one part, and its FLOPs per token, forward and backward (see `FLOP_CONVENTION`)."""

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
    parts, depth = count_model_parts(config), config.num_nextn_predict_layers
    attention = attention_flops(config, sequence_length)

    def products(part: ModelPart) -> float:
        """Return the FLOPs of products with the weights that one token visits."""
        share = config.num_experts_per_tok, config.n_routed_experts
        weights = (each for each in part.parameters if len(each.shape) > 1)
        return 6.0 * sum(each.elements * share[0] // share[1] if each.is_expert else each.elements for each in weights)

    dense, moe = (PartCost(each.total, products(each) + attention) for each in (parts.dense_layer, parts.moe_layer))
    head = products(parts.head)
    return ModelPartCosts(
        embedding=PartCost(parts.embedding.total, 0.0),
        layers=(dense,) * config.first_k_dense_replace + (moe,) * config.num_moe_layers,
        head=PartCost(parts.head.total, head),
        mtp=PartCost(parts.mtp.total, products(parts.mtp) + depth * (head + attention)),
    )


def attention_flops(config: ModelConfig, sequence_length: int) -> float:
    """Return FLOPs per token and layer of core attention, forward and backward, causal: half of S x S."""
    return 3.0 * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * sequence_length


@dataclass(frozen=True)
class FlopCount:
    """FLOPs per token of one forward and backward pass; see `FLOP_CONVENTION`.

    DeepSeek-V3's published 385 TFLOPS per GPU (Insights paper, table 4) count `main_model`: causal, without MTP.
    """

    main_model: float
    mtp: float
    """FLOPs of the MTP modules, including their passes through the head."""
    main_model_full_attention: float
    """`main_model` with the full S x S of attention, the convention of the published 432 TFLOPS."""

    @property
    def main_and_mtp(self) -> float:
        """FLOPs of main model and MTP modules, causal."""
        return self.main_model + self.mtp


def count_flops(config: ModelConfig, sequence_length: int) -> FlopCount:
    """Count FLOPs per token at this sequence length."""
    parts = count_part_costs(config, sequence_length)
    main = sum(layer.flops for layer in parts.layers) + parts.head.flops
    return FlopCount(
        main_model=main,
        mtp=parts.mtp.flops,
        main_model_full_attention=main + config.num_hidden_layers * attention_flops(config, sequence_length),
    )
