"""Floating point operations a training token costs, from the model's shapes."""

from __future__ import annotations

from dataclasses import dataclass

from ..model.config import ModelConfig
from .part_costs import attention_flops, count_part_costs

FLOP_CONVENTION = (
    "model FLOPs: 2 a multiply-add, backward = 2 x forward, causal attention (half of S x S), "
    "router and head included, embedding look-up and recomputation not"
)


@dataclass(frozen=True)
class FlopCount:
    """FLOPs a token of one forward and backward pass; see `FLOP_CONVENTION`.

    DeepSeek-V3's published 385 TFLOPS a GPU (Insights paper, table 4) count `main`: causal, without MTP.
    """

    main_model: float
    mtp: float
    """What the MTP modules add, each with its pass through the head."""
    main_model_full_attention: float
    """`main` with the whole S x S of attention, the convention behind the published 432 TFLOPS."""

    @property
    def main_and_mtp(self) -> float:
        """Main model and MTP modules, causal."""
        return self.main_model + self.mtp


def count_flops(config: ModelConfig, sequence_length: int) -> FlopCount:
    """FLOPs a token at this sequence length."""
    parts = count_part_costs(config, sequence_length)
    main = sum(layer.flops for layer in parts.layers) + parts.head.flops
    return FlopCount(
        main_model=main,
        mtp=parts.mtp.flops,
        main_model_full_attention=main + config.num_hidden_layers * attention_flops(config, sequence_length),
    )
