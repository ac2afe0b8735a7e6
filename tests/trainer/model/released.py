"""Between the model under test and the names of the released checkpoint, which the reference twin and transformers use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from datetime import timedelta

import torch
from torch import Tensor

from shoestring.comm.flat import FlatExchange
from shoestring.comm.groups import ProcessGroups
from shoestring.comm.pending import Worker
from shoestring.comm.topology import Topology
from shoestring.comm.traffic import Traffic
from shoestring.tests.reference.deepseek_v3 import ReferenceConfig
from shoestring.trainer.model.chunk import Chunk, Forward, LossScales, drive
from shoestring.trainer.model.config import ModelConfig, YarnConfig
from shoestring.trainer.model.model import Model

_ATTENTION = {
    "q_proj": "q_proj", "q_down": "q_a_proj", "q_norm": "q_a_layernorm", "q_up": "q_b_proj",
    "kv_down": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "kv_up": "kv_b_proj", "out": "o_proj",
}  # fmt: skip


def model_config(config: ReferenceConfig) -> ModelConfig:
    """The same shape in the project's words."""
    shared = {field.name for field in fields(ModelConfig)} & {field.name for field in fields(ReferenceConfig)}
    values = {name: value for name, value in vars(config).items() if name in shared - {"yarn"}}
    yarn = None if config.yarn is None else YarnConfig(**asdict(config.yarn))
    return ModelConfig(**values, norm_eps=config.rms_eps, yarn=yarn)


def released_parts(model: Model) -> Iterator[tuple[str, Tensor, bool]]:
    """(released name, view of a parameter or buffer of this rank, whether it is a parameter)."""
    yield "model.embed_tokens.weight", model.embedding.weight, True
    yield "model.norm.weight", model.final_norm.weight, True
    yield "lm_head.weight", model.head.weight, True
    for index, layer in enumerate(model.layers):
        yield from _layer(f"model.layers.{index}", layer, model)
    for depth, module in enumerate(model.mtp):
        prefix = f"model.layers.{len(model.layers) + depth}"
        yield f"{prefix}.enorm.weight", module.embedding_norm.weight, True
        yield f"{prefix}.hnorm.weight", module.hidden_norm.weight, True
        yield f"{prefix}.eh_proj.weight", module.project.weight, True
        yield f"{prefix}.shared_head.norm.weight", module.final_norm.weight, True
        yield from _layer(prefix, module.layer, model)


def _layer(prefix: str, layer: torch.nn.Module, model: Model) -> Iterator[tuple[str, Tensor, bool]]:
    yield f"{prefix}.input_layernorm.weight", layer.attention_norm.weight, True
    yield f"{prefix}.post_attention_layernorm.weight", layer.ffn_norm.weight, True
    for ours, theirs in _ATTENTION.items():
        if ours in dict(layer.attention.named_children()):
            yield f"{prefix}.self_attn.{theirs}.weight", layer.attention.get_submodule(ours).weight, True
    children = dict(layer.named_children())
    if "ffn" in children:
        yield from _swiglu(f"{prefix}.mlp", layer.ffn.gate_up.weight, layer.ffn.down.weight)
        return
    yield f"{prefix}.mlp.gate.weight", layer.router.weight, True
    yield f"{prefix}.mlp.gate.e_score_correction_bias", layer.router.bias_E, False
    if "shared" in children:
        yield from _swiglu(f"{prefix}.mlp.shared_experts", layer.shared.gate_up.weight, layer.shared.down.weight)
    for local in range(model.local_experts):
        expert = f"{prefix}.mlp.experts.{model.first_expert + local}"
        yield from _swiglu(expert, layer.experts.gate_up_LFD[local], layer.experts.down_LDF[local])


def _swiglu(prefix: str, gate_up: Tensor, down: Tensor) -> Iterator[tuple[str, Tensor, bool]]:
    gate, up = gate_up.chunk(2)
    yield f"{prefix}.gate_proj.weight", gate, True
    yield f"{prefix}.up_proj.weight", up, True
    yield f"{prefix}.down_proj.weight", down, True


def load_released(model: Model, params: Mapping[str, Tensor]) -> None:
    """Fill this rank's share of the model."""
    with torch.no_grad():
        for name, tensor, _ in released_parts(model):
            tensor.copy_(params[name])


def released_gradients(model: Model) -> dict[str, Tensor]:
    """This rank's gradients by released name."""
    parameters = list(model.named_parameters())
    weights = [parameter.data for _, parameter in parameters]
    try:
        for _, parameter in parameters:  # let the views of `released_parts` look at the gradients
            assert parameter.grad is not None
            parameter.data = parameter.grad
        return {name: view.detach().clone() for name, view, trained in released_parts(model) if trained}
    finally:
        for (_, parameter), weight in zip(parameters, weights, strict=True):
            parameter.data = weight


def make_chunk(
    config: ReferenceConfig, params: Mapping[str, Tensor], dtype: torch.dtype, topology: Topology, rank: int
) -> Chunk:
    """The model under test with these weights, on one rank of `topology`."""
    groups = ProcessGroups.create(topology, rank, timedelta(seconds=30))
    model = Model(model_config(config), expert_ranks=topology.ep, expert_rank=topology.ep_rank(rank))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    load_released(model, params)
    worker = Worker(threaded=topology.ep > 1)
    return Chunk(model, FlatExchange(groups.ep, config.experts, worker, Traffic(topology, rank)), dtype)


def run_losses(chunk: Chunk, tokens_BW: Tensor, valid_BW: Tensor, scales: LossScales) -> Forward:
    """Forward and backward of one micro-batch."""
    forward = drive(chunk.losses(tokens_BW, valid_BW))
    drive(forward.backward(scales))
    return forward


def largest_difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Maximum over the parameters of `ours` of ‖Δ‖ / ‖theirs‖; where theirs is zero, ours must be too."""
    worst = 0.0
    for name, tensor in ours.items():
        expected = theirs[name].to(tensor.dtype)
        difference, norm = float((tensor - expected).norm()), float(expected.norm())
        worst = max(worst, difference / norm if norm > 0 else difference)
    return worst
