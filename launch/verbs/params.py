"""`shoestring params`: parameters, FLOPs and activations of a model, with the conventions used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Group, RenderableType
from rich.table import Table

from ...comm.exchange.config import ExchangeConfig
from ...trainer.config import RunConfig
from ...trainer.costs.flops import FLOP_CONVENTION, count_flops
from ...trainer.costs.operation_memory import MicroBatchShape
from ...trainer.costs.parameters import count_parameters
from ...trainer.memory.workspace import WorkspaceBytes
from ...trainer.model.recompute import RecomputeModule
from ..compose import compose_run_config

_PUBLISHED_LENGTH = 4096


def params_as_dict(overrides: Sequence[str], config_dir: Path | None) -> dict[str, object]:
    """Return the figures as plain values; FLOPs are per token, forward plus backward."""
    config = compose_model_config(overrides, config_dir)
    count, length = count_parameters(config.model), config.training.sequence_length
    flops = count_flops(config.model, length)
    return {
        "model": config.model.name,
        "parameters": {
            "main": count.main,
            "main_active": count.main_active,
            "mtp": count.mtp,
            "mtp_active": count.mtp_active,
            "embedding": count.embedding,
            "head": count.head,
            "routed_experts": count.routed_experts,
        },
        "sequence_length": length,
        "flops_per_token": {
            "main": flops.main_model,
            "with_mtp": flops.main_and_mtp,
            "main_full_attention": flops.main_model_full_attention,
        },
        "convention": FLOP_CONVENTION,
        "activation_bytes": {
            layer: {
                "no_recompute": _layer_bytes(config, layer, frozenset()),
                "with_recompute": _layer_bytes(config, layer, config.recompute.recompute_modules),
            }
            for layer in _layers(config)
        },
    }


def params_table(overrides: Sequence[str], config_dir: Path | None) -> RenderableType:
    """Return the figures as tables."""
    config = compose_model_config(overrides, config_dir)
    count, length = count_parameters(config.model), config.training.sequence_length
    flops = count_flops(config.model, length)
    parameters = Table(title=f"Parameters of {config.model.name}", title_justify="left")
    for heading in ("part", "all", "active per token"):
        parameters.add_column(heading, justify="left" if heading == "part" else "right")
    parameters.add_row("main model, embedding and head included", _big(count.main), _big(count.main_active))
    parameters.add_row("  embedding", _big(count.embedding), _big(count.embedding))
    parameters.add_row("  head", _big(count.head), _big(count.head))
    active_experts = count.routed_experts * config.model.num_experts_per_tok // config.model.n_routed_experts
    parameters.add_row("  routed experts", _big(count.routed_experts), _big(active_experts))
    if config.model.num_nextn_predict_layers:
        parameters.add_row("MTP modules, in addition", _big(count.mtp), _big(count.mtp_active))
    table = Table(title=f"Training FLOPs per token at sequence length {length}", title_justify="left")
    table.add_column("convention")
    table.add_column("GFLOP", justify="right")
    table.add_row("main model, causal attention", _giga(flops.main_model))
    if config.model.num_nextn_predict_layers:
        table.add_row("main model and MTP, causal attention", _giga(flops.main_and_mtp))
    table.add_row("main model, full (non-causal) attention", _giga(flops.main_model_full_attention))
    return Group(parameters, table, f"Convention: {FLOP_CONVENTION}.\n", _activations(config))


def _activations(config: RunConfig) -> Table:
    """Return the saved activations per layer, without recompute and with the configured modules."""
    length, policy = config.training.sequence_length, config.recompute.recompute_modules
    title = f"Saved activations per layer, one sequence of {length} tokens, BF16 on a GPU (predicted)"
    table = Table(title=title, title_justify="left")
    for heading in ("layer", "no recompute, MiB", *([f"recompute {', '.join(sorted(policy))}"] if policy else [])):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for layer in _layers(config):
        sizes = [_layer_bytes(config, layer, each) for each in ((frozenset(), policy) if policy else (frozenset(),))]
        table.add_row(layer, *(f"{size / 2**20:,.1f}" for size in sizes))
    return table


def _layers(config: RunConfig) -> list[str]:
    """Return the kinds of layers that the model has."""
    counts = {"dense": config.model.first_k_dense_replace, "routed": config.model.num_moe_layers}
    return [layer for layer, count in counts.items() if count]


def _layer_bytes(config: RunConfig, layer: str, policy: frozenset[RecomputeModule]) -> float:
    batch = MicroBatchShape(1, config.training.sequence_length, torch.bfloat16, on_cpu=False)
    memory = WorkspaceBytes(config.model, batch, policy, ExchangeConfig(), ep_size=1)
    return memory.layer_bytes(is_dense=layer == "dense")


def compose_model_config(overrides: Sequence[str], config_dir: Path | None) -> RunConfig:
    """Compose the configuration; the sequence length is 4,096, the published one, unless it is given."""
    vocabulary = ["data.vocab_size=${model.vocab_size}"]
    length = [f"training.sequence_length={_PUBLISHED_LENGTH}"]
    given = any(text.lstrip("+").startswith(("training.sequence_length=", "experiment=")) for text in overrides)
    return compose_run_config([*vocabulary, *([] if given else length), *overrides], config_dir)


def _big(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:,}"


def _giga(flops: float) -> str:
    return f"{flops / 1e9:.1f}" if flops >= 1e9 else f"{flops / 1e9:.4f}"
