"""Floating point operations per training token, from the model's shapes."""

from __future__ import annotations

from dataclasses import dataclass

from ..model.config import ModelConfig
from .part_costs import attention_flops, count_part_costs

FLOP_CONVENTION = (
    "model FLOPs: 2 per multiply-add, backward = 2 x forward, causal attention (half of S x S), "
    "with router and head, without embedding look-up and recomputation"
)


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
