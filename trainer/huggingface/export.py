"""From a checkpoint to a directory that `transformers` loads, one tensor in memory at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from ...comm.errors import ConfigError, Problem, refuse_if_any
from ...comm.files.access import another_directory, refusing
from ..checkpoint.manifest import Damaged
from ..checkpoint.opened import Checkpoint
from ..checkpoint.tensor_file import Declared, TensorFileWriter
from ..data.files import sync_directory, write_file
from ..data.unfinished import clear_leftovers, unfinished, unlock
from .blocks import quantize_blocks, scales_of
from .config import config_json, not_read
from .names import SCALE, Entry, entries, is_quantized, to_halves
from .tokenizer import TOKENIZER, described, special_tokens

_MOST_PROBLEMS = 8
INDEX = "model.safetensors.index.json"
_UNFINISHED = "exporting"
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.bfloat16}
_NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


@dataclass(frozen=True)
class ExportOptions:
    """How the weights are written."""

    dtype: str = "bf16"
    """`bf16`, `fp32`, or `fp8`: projections of layers with a scale for each block of 128 × 128, the rest BF16."""
    rope_interleave: bool = True
    """Whether rotated rows stand in neighboring pairs, as in the released weights, or in two halves."""
    shard_bytes: int = 5 * 10**9
    """Largest file; a tensor that is larger has one of its own."""


def export(checkpoint: Checkpoint, directory: Path, options: ExportOptions, say: Callable[[str], None]) -> None:
    """Write `directory`, which must not exist or be empty. It appears under its name when it is complete.

    Raises `ConfigError` for a model that `DeepseekV3ForCausalLM` is not, and for a checkpoint that is damaged.
    """
    if "\0" in str(directory):
        raise ConfigError([Problem("directory", str(directory), "holds a NUL character, which no name of a file has")])
    if directory.name in ("", ".."):
        raise ConfigError([Problem("directory", str(directory), "has no name of its own; name a new directory")])
    if os.path.lexists(directory) and not directory.is_dir():
        raise ConfigError([Problem("directory", str(directory), "is no directory; name another")])
    if directory.exists() and any(directory.iterdir()):
        raise ConfigError([Problem("directory", str(directory), "exists and is not empty; name another")])
    config = checkpoint.model
    planned = entries(config)
    if missing := checkpoint.missing(entry.name for entry in planned):
        raise ConfigError([Problem("checkpoint", str(checkpoint.path), f"holds no tensor {missing[0]}")])
    refuse_if_any(islice(_misfits(checkpoint, planned), _MOST_PROBLEMS))
    context = checkpoint.setting("training", "sequence_length", default=4096)
    dtype, fp8 = _DTYPES[options.dtype], options.dtype == "fp8"
    source = checkpoint.source
    pairs = options.rope_interleave
    tree = config_json(config, dtype=_NAMES[dtype], fp8=fp8, rope_interleave=pairs, context=context, source=source)
    if source is not None and (left := not_read(source)):
        say(f"left out, keys that the imported config.json had and that mean nothing here: {', '.join(left)}")
    with _appearing_whole(directory, say) as partial:
        try:
            _write_weights(checkpoint, planned, partial, options, say)
            attachments = checkpoint.attachments()
        except Damaged as damaged:
            raise ConfigError([Problem("checkpoint", str(damaged), "is damaged; export another one")]) from damaged
        with refusing(checkpoint.path / TOKENIZER, "export another checkpoint"):
            own = special_tokens(attachments)
        tree |= {key: value for key, value in own.items() if tree[key] is None}
        write_file(partial / "config.json", (json.dumps(tree, indent=2) + "\n").encode())
        for name, raw in described(attachments, tree["max_position_embeddings"]).items():
            write_file(partial / name, raw)


def _misfits(checkpoint: Checkpoint, planned: Sequence[Entry]) -> Iterator[Problem]:
    """Tensors that are not those of the model that the checkpoint's configuration describes."""
    for entry in planned:
        stored = checkpoint.manifest.tensors[entry.name]
        if stored.shape != entry.shape or not stored.dtype.is_floating_point:
            found = f"{stored.dtype} {list(stored.shape)}"
            hint = f"must be floating-point {list(entry.shape)} by its configuration; export another checkpoint"
            yield Problem(f"{checkpoint.path}: {entry.name}", found, hint)


@contextmanager
def _appearing_whole(directory: Path, say: Callable[[str], None]) -> Iterator[Path]:
    """A directory to write into, which gets the name of `directory` at the end, or is gone after an error."""
    clear_leftovers(directory, _UNFINISHED, say)
    try:
        with unfinished(directory, _UNFINISHED, "directory") as partial:
            yield partial
            unlock(partial)
            sync_directory(partial)
            if directory.exists():
                directory.rmdir()
            partial.rename(directory)
    except OSError as error:
        hint = f"cannot be written ({error.strerror}); {another_directory(error)}"
        raise ConfigError([Problem("directory", str(directory), hint)]) from error


def _write_weights(
    checkpoint: Checkpoint,
    planned: Sequence[Entry],
    directory: Path,
    options: ExportOptions,
    say: Callable[[str], None],
) -> None:
    shards = list(_shards(planned, options))
    weights: dict[str, str] = {}
    size = 0
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        declared = [each for entry in shard for each in _declared(entry, options)]
        with TensorFileWriter(directory / file, declared, {"format": "pt"}) as writer:
            for entry in shard:
                for tensor in _tensors(checkpoint.read(entry.name), entry, options):
                    writer.write(tensor)
        weights |= {each.name: file for each in declared}
        size += sum(each.bytes for each in declared)
        say(f"{file}: {len(declared)} tensors, {sum(each.bytes for each in declared):,} bytes")
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weights.items()))}
        write_file(directory / INDEX, (json.dumps(index, indent=2) + "\n").encode())


def _shards(planned: Sequence[Entry], options: ExportOptions) -> Iterator[list[Entry]]:
    """Neighbors together, as many as fit into a file; what is cut from one tensor stays in one file."""
    shard: list[Entry] = []
    size = 0
    for entry in planned:
        more = sum(each.bytes for each in _declared(entry, options))
        if shard and size + more > options.shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(entry)
        size += more
    yield shard


def _declared(entry: Entry, options: ExportOptions) -> Iterator[Declared]:
    """What `_tensors` gives, in its order."""
    for name in entry.released:
        if options.dtype == "fp8" and is_quantized(name):
            yield Declared(name, torch.float8_e4m3fn, entry.part_shape)
            yield Declared(name + SCALE, torch.float32, scales_of(entry.part_shape))
        else:
            yield Declared(name, _dtype(name, options), entry.part_shape)
    for name in entry.copies:
        yield Declared(name, _dtype(name, options), entry.part_shape)


def _tensors(tensor: Tensor, entry: Entry, options: ExportOptions) -> Iterator[Tensor]:
    if entry.rotated is not None and not options.rope_interleave:
        tensor = to_halves(tensor, entry.rotated)
    for name, part in zip(entry.released, tensor.chunk(len(entry.released)), strict=True):
        if options.dtype == "fp8" and is_quantized(name):
            try:
                yield from quantize_blocks(part)
            except ValueError as error:
                raise ConfigError([Problem(name, options.dtype, f"{error}; export bf16")]) from error
        else:
            yield part.to(_dtype(name, options))
    for name in entry.copies:
        yield tensor.to(_dtype(name, options))


def _dtype(name: str, options: ExportOptions) -> torch.dtype:
    """Routing biases stay FP32, as in the released weights."""
    return torch.float32 if name.endswith("e_score_correction_bias") else _DTYPES[options.dtype]
