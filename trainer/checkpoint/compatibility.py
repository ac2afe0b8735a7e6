"""Rules for resuming from a checkpoint: any parallel layout, but the same model, numerics and data."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch

from ...comm.errors import Problem
from ...comm.files.strict_json import JsonValue, MalformedFileError
from ..config import RunConfig
from ..data.manifest import DataManifest
from .checkpoint import Checkpoint
from .pieces import MODEL_STATE

_FIXED = (
    *("model", "precision", "optimizer.moments", "optimizer.ema_decay"),
    *("training.seed", "training.sequence_length", "training.global_batch_size"),
    *("training.rampup_start_batch_size", "training.rampup_batch_size_increment", "training.rampup_tokens"),
)
"""Keys that shapes, dtypes or data positions depend on. All others may change at a resume: rank grid, schedule,
learning rate, loss weights, micro-batch size, intervals, number of tokens."""


def resume_problems(
    metadata: Mapping[str, Any], config: RunConfig, data: DataManifest | None = None
) -> Iterator[Problem]:
    """Yield each reason why `config` on `data` cannot resume from a checkpoint with this `metadata`."""
    try:
        _check_metadata(JsonValue(dict(metadata), "metadata"))
    except MalformedFileError as error:
        yield error.to_problem("checkpoint", "restore it, or use another training.run_dir")
        return
    now = asdict(config)
    for path in _FIXED:
        saved, wanted = metadata["config"], now
        for key in path.split("."):
            saved, wanted = saved.get(key), wanted[key]  # a missing key: the checkpoint is older than the key
        yield from _differences(path, saved, wanted, metadata["step"])
    if data is not None and metadata.get("tokenizer") != data.tokenizer.sha256:
        hint = f"has another tokenizer than the checkpoint of step {metadata['step']} was trained with; restore it"
        yield Problem("data.prepared", config.data.prepared, f"{hint}, or use another training.run_dir")
    elif data is not None and metadata.get("data") != data.content_hash:
        hint = f"holds other tokens than the checkpoint of step {metadata['step']} was trained on; restore them"
        yield Problem("data.prepared", config.data.prepared, f"{hint}, or use another training.run_dir")


def _check_metadata(metadata: JsonValue) -> None:
    """Check the types of the metadata that a run reads. Raises `MalformedFileError`."""
    metadata["step"].as_integer()
    for path in _FIXED:
        group, _, key = path.partition(".")
        if key:
            metadata["config"][group].as_mapping()
    for name in ("tokenizer", "data", "compute"):
        if (item := metadata.get(name)) is not None:
            item.as_string()
    if "eos_token_id" in metadata:
        metadata["eos_token_id"].as_integer()
    if "evaluation_pending" in metadata:
        metadata["evaluation_pending"].as_boolean()
    if "ledger" in metadata:
        ledger = metadata["ledger"]
        ledger["head"].as_string()
        for name in ("gpu_ms", "tokens_consumed", "tokens_retained"):
            ledger[name].as_integer()


def compute_dtype_problems(metadata: Mapping[str, Any], dtype: torch.dtype) -> Iterator[Problem]:
    """Yield a problem if `precision.compute=auto` means another dtype on this device than in the checkpoint."""
    saved = metadata.get("compute", str(dtype))
    if saved != str(dtype):
        before, now = saved.removeprefix("torch."), str(dtype).removeprefix("torch.")
        hint = f"means {now} on this device, and the checkpoint of step {metadata['step']} was computed in {before}"
        yield Problem("precision.compute", "auto", f"{hint}; use such a device, or another training.run_dir")


_FREE_MODEL = ("name", "rope_scaling", "initializer_range")
"""Model keys that may change when a run starts from other weights: a context extension changes only RoPE."""


def start_from_problems(
    checkpoint: Checkpoint, config: RunConfig, data: DataManifest | None = None
) -> Iterator[Problem]:
    """Yield each reason why `config` on `data` cannot start with the weights of `checkpoint`."""
    saved, wanted = asdict(checkpoint.model_config), asdict(config.model)
    for key in wanted:
        if key not in _FREE_MODEL and saved[key] != wanted[key]:
            hint = f"the checkpoint of training.start_from has {saved[key]!r}; use that, or another checkpoint"
            yield Problem(f"model.{key}", wanted[key], hint)
    embedding = f"{MODEL_STATE}/embedding.weight"
    if checkpoint.missing_tensors([embedding]):
        yield Problem("training.start_from", str(checkpoint.path), f"holds no tensor {embedding}; name another")
        return
    stored = checkpoint.manifest.tensors[embedding].dtype
    if stored != config.precision.parameter_dtype():
        hint = f"the weights of training.start_from are {stored}, and parameters would be another dtype"
        yield Problem("precision.compute", config.precision.compute, hint)
    tokenizers = [entry.sha256 for entry in checkpoint.manifest.attachments if entry.file == "tokenizer.json"]
    if data is not None and tokenizers and tokenizers != [data.tokenizer.sha256]:
        hint = "has another tokenizer than the checkpoint of training.start_from; use data prepared with that one"
        yield Problem("data.prepared", config.data.prepared, hint)


def _differences(path: str, saved: Any, wanted: Any, step: int) -> Iterator[Problem]:
    if isinstance(saved, Mapping) and isinstance(wanted, Mapping):
        for key in wanted:
            yield from _differences(f"{path}.{key}", saved.get(key), wanted[key], step)
    elif saved != wanted:
        hint = f"the checkpoint of step {step} has {saved!r}; use that, or another training.run_dir"
        yield Problem(path, wanted, hint)
