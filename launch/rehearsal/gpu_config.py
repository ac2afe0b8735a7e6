"""The configuration of a run as its GPUs would have it: what `auto` stands for there, and what cannot be rehearsed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from ...comm.errors import Problem, raise_if_any
from ...trainer.config import RunConfig
from ...trainer.model.attention_backend import unsupported_shape_reasons

FAKE_DEVICE = torch.device("cuda", 0)
"""That of every rehearsed rank."""


def gpu_run_config(config: RunConfig, micro_batches: int | None) -> RunConfig:
    """Return the run as it is on the GPUs it is for, in steps of so many micro-batches. Raises `ConfigError`."""
    training = replace(config.training, device="cuda")
    if micro_batches is not None:
        size = micro_batches * config.global_micro_batch_size
        training = replace(
            training,
            global_batch_size=size,
            rampup_start_batch_size=None,
            rampup_batch_size_increment=None,
            rampup_tokens=0,
        )
    config = replace(config, training=training)
    raise_if_any([*config.problems(), *_unknown(config)])
    if config.training.attention_backend == "auto":
        config = replace(config, training=replace(config.training, attention_backend=_attention(config)))
    precision = config.precision
    if precision.linear == "fp8" and precision.fp8_backend == "auto":
        precision = replace(precision, fp8_backend="triton")
    return replace(config, precision=precision)


def _attention(config: RunConfig) -> str:
    """What `auto` takes on a Hopper GPU with all that it needs, but for FlashAttention-3, which is not in torch."""
    case = config.attention_shape(config.precision.compute_dtype(FAKE_DEVICE))
    return next(name for name in ("cudnn", "efficient", "math") if not any(unsupported_shape_reasons(name, case)))


def _unknown(config: RunConfig) -> Iterator[Problem]:
    if config.exchange.name == "deepep":
        hint = (
            "cannot be rehearsed: DeepEP's kernels need GPUs; rehearse exchange=two_hop_fp8, which sends the same rows"
        )
        yield Problem("exchange.name", "deepep", hint)
    if config.precision.compute == "float32" and config.model.num_moe_layers + config.model.num_nextn_predict_layers:
        hint = "cannot be rehearsed: torch's grouped product has a fake kernel for BF16 alone; write auto"
        yield Problem("precision.compute", "float32", hint)
    if config.precision.fp8_backend not in ("auto", "triton"):
        hint = "cannot be rehearsed: its kernels need a GPU; write auto or triton"
        yield Problem("precision.fp8_backend", config.precision.fp8_backend, hint)
