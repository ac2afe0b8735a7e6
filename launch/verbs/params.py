"""`shoestring params`: parameters, FLOPs and activations of a model, with the conventions used."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from ...comm.exchange.config import ExchangeConfig
from ...trainer.config import RunConfig
from ...trainer.costs.flops import FLOP_CONVENTION, count_flops
from ...trainer.costs.operation_memory import MicroBatchShape
from ...trainer.costs.parameters import count_parameters
from ...trainer.memory.workspace import WorkspaceBytes
from ...trainer.model.recompute import RecomputeModule
from ..answers.blocks import Answer, Block, Cell, Paragraph, Quantity, number, records_table, table
from ..answers.options import add_override_arguments
from ..compose import compose_run_config

_PUBLISHED_LENGTH = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    add_override_arguments(parser)


def answer(options: argparse.Namespace) -> Answer:
    """Return the figures of the model that the options describe; FLOPs are per token, forward plus backward."""
    config = compose_model_config(options.overrides, options.config_dir)
    model, length, policy = config.model, config.training.sequence_length, config.recompute.recompute_modules
    count, flops = count_parameters(model), count_flops(model, length)
    active_experts = count.routed_experts * model.num_experts_per_tok // model.n_routed_experts
    layers = {"dense": model.first_k_dense_replace, "routed": model.num_moe_layers}
    policies: dict[str, frozenset[RecomputeModule]] = {"no_recompute": frozenset(), "with_recompute": policy}
    activations = {
        layer: {key: _layer_bytes(config, layer, recomputed) for key, recomputed in policies.items()}
        for layer, num_layers in layers.items()
        if num_layers
    }
    data = {
        "model": model.name,
        "parameters": vars(count) | {"routed_experts_active": active_experts},
        "sequence_length": length,
        "flops_per_token": {
            "main": flops.main_model,
            "with_mtp": flops.main_and_mtp,
            "main_full_attention": flops.main_model_full_attention,
        },
        "convention": FLOP_CONVENTION,
        "activation_bytes": activations,
    }
    blocks = [*_model_tables(config, active_experts), _activations(config, activations)]
    return Answer.from_blocks(f"Parameters of {model.name}", data, blocks)


def _model_tables(config: RunConfig, active_experts: int) -> Iterator[Block]:
    model, length = config.model, config.training.sequence_length
    count, flops, has_mtp = count_parameters(model), count_flops(model, length), model.num_nextn_predict_layers > 0
    rows = {
        "main model, embedding and head included": (count.main, count.main_active),
        "  embedding": (count.embedding, count.embedding),
        "  head": (count.head, count.head),
        "  routed experts": (count.routed_experts, active_experts),
    } | ({"MTP modules, in addition": (count.mtp, count.mtp_active)} if has_mtp else {})
    cells: list[Sequence[Cell]] = [(name, *map(_big, sizes)) for name, sizes in rows.items()]
    yield table(f"Parameters of {model.name}", ("part", "all", "active per token"), cells)
    conventions = {"main model, causal attention": flops.main_model}
    if has_mtp:
        conventions["main model and MTP, causal attention"] = flops.main_and_mtp
    conventions["main model, full (non-causal) attention"] = flops.main_model_full_attention
    title = f"Training FLOPs per token at sequence length {length}"
    yield table(title, ("convention", "GFLOP"), [(name, _giga(size)) for name, size in conventions.items()])
    yield Paragraph(f"Convention: {FLOP_CONVENTION}.\n")


def _activations(config: RunConfig, activations: Mapping[str, Mapping[str, float]]) -> Block:
    """Return the saved activations per layer, without recompute and with the configured modules."""
    policy = config.recompute.recompute_modules
    title = f"one sequence of {config.training.sequence_length} tokens, BF16 on a GPU (predicted)"
    headings = {"layer": "layer", "no_recompute": "no recompute, MiB"}
    headings |= {"with_recompute": f"recompute {', '.join(sorted(policy))}"} if policy else {}
    records = [{"layer": layer, **sizes} for layer, sizes in activations.items()]
    formats = dict.fromkeys(("no_recompute", "with_recompute"), lambda size: f"{size * 2**-20:,.1f}")
    return records_table(f"Saved activations per layer, {title}", headings, records, formats)


def _layer_bytes(config: RunConfig, layer: str, policy: frozenset[RecomputeModule]) -> float:
    batch = MicroBatchShape(1, config.training.sequence_length, torch.bfloat16, on_cpu=False)
    memory = WorkspaceBytes(config.model, batch, policy, ExchangeConfig(), ep_size=1)
    return memory.layer_bytes(is_dense=layer == "dense")


def compose_model_config(overrides: Sequence[str], config_dir: Path | None) -> RunConfig:
    """Compose the configuration; the sequence length is 4,096, the published one, unless it is given."""
    length = [f"training.sequence_length={_PUBLISHED_LENGTH}"]
    given = any(text.lstrip("+").startswith(("training.sequence_length=", "experiment=")) for text in overrides)
    # The model is described, and need not fit the tokenizer of the default data.
    return compose_run_config([*([] if given else length), *overrides], config_dir, unchecked=["data.vocab_size"])


def _big(count: int) -> Quantity:
    for unit, size in (("B", 10**9), ("M", 10**6)):
        if count >= size:
            return number(count, ".2f", f" {unit}", scale=1 / size)
    return number(count)


def _giga(flops: float) -> Quantity:
    return number(flops, ".1f" if flops >= 1e9 else ".4f", scale=1e-9)
