"""Parameters of a model by part, taken on the meta device: 671 B parameters need no memory."""

import math
from dataclasses import dataclass
from functools import cache, cached_property

import torch

from ..model.config import ModelConfig
from ..model.model import Model, ModelShard


@dataclass(frozen=True)
class ModelParameter:
    """One parameter of the whole model."""

    shape: tuple[int, ...]
    is_expert: bool
    """True if its first dimension is the routed experts of a layer."""
    is_wide: bool
    """True if it is FP32 or wider for any compute dtype: norms and routers."""
    is_fp8: bool
    """True if FP8 training computes with it in FP8."""

    @property
    def elements(self) -> int:
        """Number of elements, of all experts together."""
        return math.prod(self.shape)

    def shape_on_rank(self, ep_size: int) -> tuple[int, ...]:
        """Return its shape on one of `ep_size` ranks that share the experts."""
        return (self.shape[0] // ep_size, *self.shape[1:]) if self.is_expert else self.shape


@dataclass(frozen=True)
class ModelPart:
    """Parameters of a part of the model."""

    parameters: tuple[ModelParameter, ...]

    @cached_property
    def dense(self) -> int:
        """Elements of all parameters but the routed experts."""
        return sum(each.elements for each in self.parameters if not each.is_expert)

    @cached_property
    def routed(self) -> int:
        """Elements of the routed experts."""
        return sum(each.elements for each in self.parameters if each.is_expert)

    @property
    def total(self) -> int:
        """Elements of all parameters."""
        return self.dense + self.routed


@dataclass(frozen=True)
class ModelParts:
    """Parts of a model that a pipeline can place on separate stages."""

    embedding: ModelPart
    dense_layer: ModelPart
    """One dense layer; without parameters if the model has none."""
    moe_layer: ModelPart
    """One layer with routed experts; without parameters if the model has none."""
    head: ModelPart
    """Head with the final norm."""
    mtp: ModelPart
    """All MTP modules, without embedding and head, which are the main model's."""


@cache
def count_model_parts(config: ModelConfig) -> ModelParts:
    """Return the parts of a model, counted once: costs, memory and plans use these figures."""
    # All layers of a kind are equal, so that one of each is built.
    layers = {index for index in (0, config.num_hidden_layers - 1) if index >= 0}
    with torch.device("meta"):
        model = Model(config, ModelShard(tuple(sorted(layers))))
    experts, wide = model.expert_parameter_names(), model.fp32_parameter_names()
    fp8 = {id(weight) for weight in model.fp8_weights()}
    is_dense = {str(index): index < config.first_k_dense_replace for index in layers}

    def part(*prefixes: str) -> ModelPart:
        return ModelPart(
            tuple(
                ModelParameter(tuple(weight.shape), name in experts, name in wide, id(weight) in fp8)
                for name, weight in model.named_parameters()
                if name.startswith(prefixes)
            )
        )

    def layer(*, dense: bool) -> ModelPart:
        index = next((index for index, kind in is_dense.items() if kind is dense), None)
        return ModelPart(()) if index is None else part(f"layers.{index}.")

    return ModelParts(
        part("embedding."), layer(dense=True), layer(dense=False), part("final_norm.", "head."), part("mtp.")
    )


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


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count the parameters of the whole model."""
    parts = count_model_parts(config)
    layers = config.first_k_dense_replace * parts.dense_layer.total + config.num_moe_layers * parts.moe_layer.total
    main, routed = parts.embedding.total + layers + parts.head.total, config.num_moe_layers * parts.moe_layer.routed

    def active(total: int, routed: int) -> int:
        return total - routed + routed * config.num_experts_per_tok // config.n_routed_experts

    return ParameterCount(
        main=main,
        main_active=active(main, routed),
        mtp=parts.mtp.total,
        mtp_active=active(parts.mtp.total, parts.mtp.routed),
        embedding=parts.embedding.total,
        head=parts.embedding.total,  # as large, but not tied to it
        routed_experts=routed,
    )
