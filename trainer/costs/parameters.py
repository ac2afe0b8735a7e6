"""Parameter counts of a model, taken on the meta device: 671 B parameters need no memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..model.config import ModelConfig
from ..model.model import Model


@dataclass(frozen=True)
class ParameterCount:
    """Exact parameter counts. A token's active parameters are its top-k routed experts and all other parameters.

    Both counts include the whole embedding table, as do the report's 671 B and the 37 B of its abstract. Routing biases
    are buffers without a gradient and are not counted.
    """

    main: int
    main_active: int
    mtp: int
    """Parameters of the MTP modules, without embedding and head, which are the main model's."""
    mtp_active: int
    embedding: int
    head: int
    routed_experts: int
    """Parameters of the main model's routed experts; part of `main`."""


def build_meta_model(config: ModelConfig) -> Model:
    """Build the whole model on the meta device: shapes without storage."""
    with torch.device("meta"):
        return Model(config)


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count the parameters of the whole model."""
    model = build_meta_model(config)
    expert_names = model.expert_parameter_names()
    total = {"main": 0, "mtp": 0}
    routed = {"main": 0, "mtp": 0}
    for name, parameter in model.named_parameters():
        part = "mtp" if name.startswith("mtp.") else "main"
        total[part] += parameter.numel()
        routed[part] += parameter.numel() if name in expert_names else 0

    table = config.vocab_size * config.hidden_size  # embedding and head are not tied to each other

    def active(part: str) -> int:
        return total[part] - routed[part] + routed[part] * config.num_experts_per_tok // config.n_routed_experts

    return ParameterCount(
        main=total["main"],
        main_active=active("main"),
        mtp=total["mtp"],
        mtp_active=active("mtp"),
        embedding=table,
        head=table,
        routed_experts=routed["main"],
    )
