"""Export of a checkpoint to a directory that `transformers` loads, with one tensor in memory at a time."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from ...comm.errors import ConfigError, Problem, raise_if_any
from ...comm.files.file_io import config_error_context, unwritable_directory_hint
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.manifest import damage_error_context
from ..checkpoint.tensor_file import TensorFileWriter, TensorSpec
from ..data.files import fsync_directory, split_by_size, write_file_durably
from ..data.tokenizer import TOKENIZER_FILE
from ..data.unfinished_directory import remove_lock, remove_unfinished_directories, unfinished_directory
from ..precision.fp8_tensors import ScaleFormat, quantize_weight
from .config import ignored_config_keys, to_config_json
from .tensor_names import SCALE_SUFFIX, TensorMapping, is_fp8_weight, make_tensor_mappings, reorder_rope_rows
from .tokenizer import make_tokenizer_files, special_token_ids

_MOST_PROBLEMS = 8
WEIGHT_INDEX_FILE = "model.safetensors.index.json"
_UNFINISHED = "exporting"
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.bfloat16}


@dataclass(frozen=True)
class ExportOptions:
    """Format of the exported weights."""

    dtype: str = "bf16"
    """`bf16`, `fp32`, or `fp8`: projections in FP8 with a scale per block of 128 × 128, the rest in BF16."""
    rope_interleave: bool = True
    """True: rotated rows are in adjacent pairs, as in the released weights; False: in two halves."""
    shard_bytes: int = 5 * 10**9
    """Largest file; a larger tensor gets a separate file."""


def export_checkpoint(
    checkpoint: Checkpoint, directory: Path, options: ExportOptions, say: Callable[[str], None]
) -> None:
    """Write `directory`, which must not exist or be empty; it gets its name when it is complete.

    Raises `ConfigError` for a model that `DeepseekV3ForCausalLM` cannot express, and for a damaged checkpoint.
    """
    if "\0" in str(directory):
        raise ConfigError([Problem("directory", str(directory), "holds a NUL character, which no name of a file has")])
    if directory.name in ("", ".."):
        raise ConfigError([Problem("directory", str(directory), "does not name a directory; name a new one")])
    if os.path.lexists(directory) and not directory.is_dir():
        raise ConfigError([Problem("directory", str(directory), "is no directory; name another")])
    if directory.exists() and any(directory.iterdir()):
        raise ConfigError([Problem("directory", str(directory), "exists and is not empty; name another")])
    config = checkpoint.model_config
    planned = make_tensor_mappings(config)
    if missing := checkpoint.missing_tensors(entry.name for entry in planned):
        raise ConfigError([Problem("checkpoint", str(checkpoint.path), f"holds no tensor {missing[0]}")])
    raise_if_any(islice(_misfits(checkpoint, planned), _MOST_PROBLEMS))
    context = checkpoint.config_value("training", "sequence_length", default=4096)
    source = checkpoint.imported_config
    tree = to_config_json(
        config,
        dtype=str(_DTYPES[options.dtype]).removeprefix("torch."),
        fp8=options.dtype == "fp8",
        rope_interleave=options.rope_interleave,
        max_position_embeddings=context,
        source=source,
    )
    if source is not None and (left := ignored_config_keys(source)):
        say(f"left out, unsupported keys of the imported config.json: {', '.join(left)}")
    with _renamed_when_complete(directory, say) as partial:
        with damage_error_context("is damaged; export another one"):
            _write_weights(checkpoint, planned, partial, options, say)
            attachments = checkpoint.read_attachments()
        with config_error_context(checkpoint.path / TOKENIZER_FILE, "export another checkpoint"):
            end = checkpoint.run_eos_token_id
            token_ids = special_token_ids(attachments, end)
            tokenizer_files = make_tokenizer_files(attachments, tree["max_position_embeddings"], end)
        tree |= {key: value for key, value in token_ids.items() if tree[key] is None}
        write_file_durably(partial / "config.json", (json.dumps(tree, indent=2) + "\n").encode())
        for name, raw in tokenizer_files.items():
            write_file_durably(partial / name, raw)


def _misfits(checkpoint: Checkpoint, planned: Sequence[TensorMapping]) -> Iterator[Problem]:
    """Yield a problem for each tensor that does not fit the checkpoint's configuration."""
    for entry in planned:
        stored = checkpoint.manifest.tensors[entry.name]
        if stored.shape != entry.shape or not stored.dtype.is_floating_point:
            found = f"{stored.dtype} {list(stored.shape)}"
            hint = f"must be floating-point {list(entry.shape)} by its configuration; export another checkpoint"
            yield Problem(f"{checkpoint.path}: {entry.name}", found, hint)


@contextmanager
def _renamed_when_complete(directory: Path, say: Callable[[str], None]) -> Iterator[Path]:
    """Yield a temporary directory, which is renamed to `directory` at the end, or removed after an error."""
    remove_unfinished_directories(directory, _UNFINISHED, say)
    try:
        with unfinished_directory(directory, _UNFINISHED, "directory") as partial:
            yield partial
            remove_lock(partial)
            fsync_directory(partial)
            if directory.exists():
                directory.rmdir()
            partial.rename(directory)
    except OSError as error:
        hint = f"cannot be written ({error.strerror}); {unwritable_directory_hint(error)}"
        raise ConfigError([Problem("directory", str(directory), hint)]) from error


def _write_weights(
    checkpoint: Checkpoint,
    planned: Sequence[TensorMapping],
    directory: Path,
    options: ExportOptions,
    say: Callable[[str], None],
) -> None:
    def exported_bytes(entry: TensorMapping) -> int:  # the parts of one tensor stay in one file
        return sum(each.nbytes for each in _declared(entry, options))

    shards = list(split_by_size(planned, exported_bytes, options.shard_bytes))
    weights: dict[str, str] = {}
    size = 0
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        declared = [each for entry in shard for each in _declared(entry, options)]
        with TensorFileWriter(directory / file, declared, {"format": "pt"}) as writer:
            for entry in shard:
                for tensor in _tensors(checkpoint.read_tensor(entry.name), entry, options):
                    writer.write_tensor(tensor)
        weights |= {each.name: file for each in declared}
        size += sum(each.nbytes for each in declared)
        say(f"{file}: {len(declared)} tensors, {sum(each.nbytes for each in declared):,} bytes")
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weights.items()))}
        write_file_durably(directory / WEIGHT_INDEX_FILE, (json.dumps(index, indent=2) + "\n").encode())


def _declared(entry: TensorMapping, options: ExportOptions) -> Iterator[TensorSpec]:
    """Yield the specs of the tensors that `_tensors` yields, in the same order."""
    for name in entry.all_hf_names:
        dtype = _dtype(name, options)
        yield TensorSpec(name, dtype, entry.hf_shape)
        if dtype == torch.float8_e4m3fn:
            yield TensorSpec(name + SCALE_SUFFIX, torch.float32, entry.hf_scale_shape)


def _tensors(tensor: Tensor, entry: TensorMapping, options: ExportOptions) -> Iterator[Tensor]:
    if entry.rope_rows is not None and not options.rope_interleave:
        tensor = reorder_rope_rows(tensor, entry.rope_rows, to_halves=True)
    parts = (*tensor.chunk(len(entry.hf_names)), *[tensor] * len(entry.hf_duplicates))
    for name, part in zip(entry.all_hf_names, parts, strict=True):
        dtype = _dtype(name, options)
        if dtype == torch.float8_e4m3fn:
            if not torch.isfinite(part).all():
                hint = "holds infinity or NaN, which FP8 cannot keep apart from a large number; export bf16"
                raise ConfigError([Problem(name, options.dtype, hint)])
            # An element x of a block with largest magnitude a has an error of at most max(|x| / 16, a / 448 / 1024):
            # half a unit in the last place, above and below the smallest normal number.
            blocks = quantize_weight(part, ScaleFormat.FP32)
            yield from (blocks.values_NK, blocks.scales_PQ)
        else:
            yield part.to(dtype)


def _dtype(name: str, options: ExportOptions) -> torch.dtype:
    """Return the exported dtype; routing biases stay FP32, as in the released weights."""
    if name.endswith("e_score_correction_bias"):
        return torch.float32
    return torch.float8_e4m3fn if options.dtype == "fp8" and is_fp8_weight(name) else _DTYPES[options.dtype]
