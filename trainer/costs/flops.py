"""Floating point operations a training token costs, from the model's shapes."""

from __future__ import annotations

from dataclasses import dataclass

from ..model.config import ModelConfig
from .parameters import count_parameters, meta_model

CONVENTION = (
    "model FLOPs: 2 a multiply-add, backward = 2 x forward, causal attention (half of S x S), "
    "router and head included, embedding look-up and recomputation not"
)


@dataclass(frozen=True)
class FlopCount:
    """FLOPs a token of one forward and backward pass; see `CONVENTION`.

    DeepSeek-V3's published 385 TFLOPS a GPU (Insights paper, table 4) count `main`: causal, without MTP.
    """

    main: float
    mtp: float
    """What the MTP modules add, each with its pass through the head."""
    main_full_attention: float
    """`main` with the whole S x S of attention, the convention behind the published 432 TFLOPS."""

    @property
    def with_mtp(self) -> float:
        """Main model and MTP modules, causal."""
        return self.main + self.mtp


def count_flops(config: ModelConfig, sequence_length: int) -> FlopCount:
    """FLOPs a token at this sequence length."""
    parameters = count_parameters(config)
    model = meta_model(config)
    norms = {"main": 0, "mtp": 0}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            norms["mtp" if name.startswith("mtp.") else "main"] += parameter.numel()
    attention = 2.0 * config.heads * (config.qk_head_dim + config.v_head_dim) * sequence_length  # a layer, whole S x S
    main_gemm = 2.0 * (parameters.main_active - parameters.embedding - norms["main"])
    mtp_gemm = 2.0 * (parameters.mtp_active - norms["mtp"] + config.mtp_depth * parameters.head)
    return FlopCount(
        main=3 * (main_gemm + config.layers * attention / 2),
        mtp=3 * (mtp_gemm + config.mtp_depth * attention / 2),
        main_full_attention=3 * (main_gemm + config.layers * attention),
    )
