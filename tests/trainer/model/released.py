"""Conversion between the model under test and released names, which the reference and transformers use."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from datetime import timedelta

import torch
from torch import Tensor

from shoestring.comm.async_comm import build_async_communicator
from shoestring.comm.exchange.config import ExchangeConfig
from shoestring.comm.exchange.factory import build_token_exchange
from shoestring.comm.groups import ProcessGroups
from shoestring.comm.topology import Topology
from shoestring.comm.traffic import TrafficCounter
from shoestring.parallelism.pipeline.instruction import run_to_completion
from shoestring.parallelism.weight_grad import DelayedWeightGradients
from shoestring.tests.reference.deepseek_v3 import ReferenceConfig
from shoestring.tests.reference.rotary import Yarn
from shoestring.trainer.model.chunk import Chunk
from shoestring.trainer.model.config import ModelConfig, YarnConfig
from shoestring.trainer.model.forward_context import ForwardOutput, LossNormalizers
from shoestring.trainer.model.model import Model, ModelShard

_ATTENTION = {
    "q_proj": "q_proj", "q_down": "q_a_proj", "q_norm": "q_a_layernorm", "q_up": "q_b_proj",
    "kv_down": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "kv_up": "kv_b_proj", "out": "o_proj",
}  # fmt: skip

_TOP = {
    "embedding.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_MTP = {
    "embedding_norm.weight": "enorm.weight",
    "hidden_norm.weight": "hnorm.weight",
    "project.weight": "eh_proj.weight",
    "final_norm.weight": "shared_head.norm.weight",
}
_LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "router.weight": "mlp.gate.weight",
    "router.bias_E": "mlp.gate.e_score_correction_bias",
}


def model_config(config: ReferenceConfig) -> ModelConfig:
    """Return the same shape as a `ModelConfig`."""
    shared = {field.name for field in fields(ModelConfig)} & {field.name for field in fields(ReferenceConfig)}
    values = {name: value for name, value in vars(config).items() if name in shared}
    yarn = None if config.yarn is None else _yarn(config.yarn)
    return ModelConfig(**values, rope_scaling=yarn)


def _yarn(yarn: Yarn) -> YarnConfig:
    values = asdict(yarn)
    return YarnConfig(original_max_position_embeddings=values.pop("original_length"), **values)


def released_parts(model: Model) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield (released name, view of a parameter or buffer of this rank, whether it is a parameter)."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for ours, tensor in tensors.items():
        yield from _released(ours, tensor, model)


def _released(name: str, tensor: Tensor, model: Model) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield the released names and views of the tensor `name`; stacked and fused weights give several."""
    if name in _TOP:
        yield _TOP[name], tensor, True
        return
    kind, number, rest = name.split(".", 2)
    index = int(number) + (model.config.num_hidden_layers if kind == "mtp" else 0)
    prefix = f"model.layers.{index}"
    if kind == "mtp" and not rest.startswith("layer."):
        yield f"{prefix}.{_MTP[rest]}", tensor, True
        return
    rest = rest.removeprefix("layer.")
    if rest.startswith("attention."):
        _, projection, _ = rest.split(".")
        yield f"{prefix}.self_attn.{_ATTENTION[projection]}.weight", tensor, True
    elif rest.startswith(("ffn.", "shared.")):
        where = "mlp" if rest.startswith("ffn.") else "mlp.shared_experts"
        yield from _swiglu(f"{prefix}.{where}", rest.split(".")[1], tensor)
    elif rest.startswith("experts."):
        for local, expert in enumerate(tensor):
            what = "gate_up" if rest.endswith("gate_up_LFD") else "down"
            yield from _swiglu(f"{prefix}.mlp.experts.{model.first_local_expert + local}", what, expert)
    else:
        yield f"{prefix}.{_LAYER[rest]}", tensor, rest != "router.bias_E"


def _swiglu(prefix: str, what: str, tensor: Tensor) -> Iterator[tuple[str, Tensor, bool]]:
    if what == "down":
        yield f"{prefix}.down_proj.weight", tensor, True
        return
    gate, up = tensor.chunk(2)
    yield f"{prefix}.gate_proj.weight", gate, True
    yield f"{prefix}.up_proj.weight", up, True


def load_released(model: Model, params: Mapping[str, Tensor]) -> None:
    """Fill this rank's share of the model."""
    with torch.no_grad():
        for name, tensor, _ in released_parts(model):
            tensor.copy_(params[name])


def released_gradients(model: Model) -> dict[str, Tensor]:
    """Return this rank's gradients by released name."""
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
    """Build the model under test with these weights, on one rank of `topology`."""
    groups = ProcessGroups.create(topology, rank, timedelta(seconds=30))
    shape = model_config(config)
    model = Model(shape, ModelShard.full_model(shape, topology.ep, topology.ep_rank(rank)))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    load_released(model, params)
    worker = build_async_communicator(groups.ep, torch.device("cpu"))
    exchange = build_token_exchange(
        ExchangeConfig(), groups, config.n_routed_experts, worker, TrafficCounter(topology, rank)
    )
    return Chunk(model, exchange, dtype)


def run_losses(chunk: Chunk, tokens_BW: Tensor, valid_BW: Tensor, scales: LossNormalizers) -> ForwardOutput:
    """Run forward and backward of one micro-batch."""
    forward = run_to_completion(chunk.forward(tokens_BW, valid_BW, scales))
    run_to_completion(forward.backward(None, DelayedWeightGradients()))
    return forward


def largest_difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Return the maximum over `ours` of ‖Δ‖ / ‖theirs‖; where theirs is zero, ours must be too."""
    worst = 0.0
    for name, tensor in ours.items():
        expected = theirs[name].to(tensor.dtype)
        difference, norm = float((tensor - expected).norm()), float(expected.norm())
        error = difference / norm if norm > 0 else difference
        worst = error if error > worst or math.isnan(error) else worst
    return worst
