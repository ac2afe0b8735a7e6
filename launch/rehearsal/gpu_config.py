"""Configuration of a run as on its GPUs: `auto` values resolved, and options that cannot be rehearsed rejected."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from ...comm.errors import Problem, raise_if_any
from ...trainer.config import RunConfig
from ...trainer.model.attention_backend import unsupported_shape_reasons

FAKE_DEVICE = torch.device("cuda", 0)
"""Device of every rehearsed rank."""


def gpu_run_config(config: RunConfig, micro_batches: int | None) -> RunConfig:
    """Return the configuration for Hopper GPUs, with the batch size of the rehearsed step and no ramp-up.

    `micro_batches` is the number per rank; None: that of the first step. Raises `ConfigError`.
    """
    training = replace(
        config.training,
        device="cuda",
        global_batch_size=config.batch_ramp.batch_size(1)
        if micro_batches is None
        else micro_batches * config.global_micro_batch_size,
        rampup_start_batch_size=None,
        rampup_batch_size_increment=None,
        rampup_tokens=0,
    )
    config = replace(config, training=training)
    raise_if_any([*config.problems(), *_unsupported(config)])
    if config.training.attention_backend == "auto":
        config = replace(config, training=replace(config.training, attention_backend=_auto_attention(config)))
    precision = config.precision
    if precision.linear == "fp8" and precision.fp8_backend == "auto":
        precision = replace(precision, fp8_backend="triton")
    return replace(config, precision=precision)


def _auto_attention(config: RunConfig) -> str:
    """Return what `auto` selects on a Hopper GPU without FlashAttention-3, which is not in torch."""
    case = config.attention_shape(config.precision.compute_dtype(FAKE_DEVICE))
    return next(name for name in ("cudnn", "efficient", "math") if not any(unsupported_shape_reasons(name, case)))


def _unsupported(config: RunConfig) -> Iterator[Problem]:
    if config.exchange.name == "deepep":
        hint = "cannot be rehearsed: DeepEP's kernels need GPUs; use exchange=two_hop_fp8, which sends the same rows"
        yield Problem("exchange.name", "deepep", hint)
    if config.precision.compute == "float32" and config.model.num_moe_layers + config.model.num_nextn_predict_layers:
        hint = "cannot be rehearsed: torch's grouped GEMM has a fake kernel only for BF16; write auto"
        yield Problem("precision.compute", "float32", hint)
    if config.precision.fp8_backend not in ("auto", "triton"):
        hint = "cannot be rehearsed: its kernels need a GPU; write auto or triton"
        yield Problem("precision.fp8_backend", config.precision.fp8_backend, hint)
