"""Parameters of a model, counted on the meta device: no memory, also for 671 B of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..model.config import ModelConfig
from ..model.model import Model


@dataclass(frozen=True)
class ParameterCount:
    """Exact counts. "Active" are those that one token meets: of the routed experts top-k, of the rest all.

    The embedding table counts as a whole in both, as in the report's 671 B and the 37 B of its abstract.
    Routing biases are buffers that no gradient reaches and are not counted.
    """

    main: int
    main_active: int
    mtp: int
    """What the MTP modules add: embedding and head are the main model's and are not counted again."""
    mtp_active: int
    embedding: int
    head: int
    routed_experts: int
    """Part of `main`."""


def build_meta_model(config: ModelConfig) -> Model:
    """The whole model, as on one rank, with shapes but without storage."""
    with torch.device("meta"):
        return Model(config)


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count every parameter of the whole model."""
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
